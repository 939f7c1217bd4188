"""The verb ``data check``: reports what is in a data set, and whether its splits overlap."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from d2llm.core.errors import InputError
from d2llm.core.inputs import check_count
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.manifest import read_manifest
from d2llm.core.progress import progress_bar
from d2llm.core.shipped import DEFAULT_STUDENT, find_shipped
from d2llm.data.check import (
    CountTokens,
    DataReport,
    Languages,
    guess_languages,
    measure_lengths,
    near_queries,
    read_through,
)
from d2llm.data.open_data import open_source
from d2llm.models.sources import find_model, load_tokenizer
from d2llm.models.student_files import FORMAT_VERSION, KIND
from d2llm.models.tokens import search_query_tokens
from d2llm.recipe import BackboneConfig, StudentConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_NUM_LANGUAGE_TEXTS = 1000


def check_data(
    data: str | Path, *, tokenizer: str = DEFAULT_STUDENT, near: float = 0.8, sample_size: int = 50_000, seed: int = 0
) -> DataReport:
    """Count the contents of a data set, and look for leaks between splits, repeated or long texts, and languages.

    The texts are streamed: memory grows with the ids and hashes, not with the texts of a corpus.

    Args:
        data: anything that ``open_data`` reads.
        tokenizer: determines tokens and length limits: a student (shipped, or its folder), with the limits of a search,
            or else the name or folder of a model, or the folder of a tokenizer, with the limits of a new student.
        near: minimum Jaccard similarity of the character trigrams of near queries, in (0, 1]; 1 disables the search.
        sample_size: number of queries and passages whose length is measured; for 1,000 of them the language is guessed.
        seed: seed of the samples.

    Raises:
        DataFormatError: the data does not exist or is malformed (the message names file and line).
        DuplicateIdError: an id, or a judged pair, occurs twice.
        InputError: ``near`` or ``sample_size`` is out of range.
        ModelNotFoundError: there is no such tokenizer.
        MissingExtraError: datasketch, py3langid or the `datasets` library is needed but not installed.
    """
    if not 0 < near <= 1:
        raise InputError(f"near is {near}, but must be above 0 and at most 1")
    check_count(sample_size, "sample_size")
    backbone, location = _backbone_of(tokenizer)
    tokens = load_tokenizer(location)  # before the data is read, so that a wrong name fails at once
    source = open_source(data)
    contents = read_through(source, sample_size=sample_size, seed=seed)
    report = contents.report
    for issue in report.issues:
        _log.warning("%s: %s", data, issue)
    leaks = list(report.leaks)
    if near < 1:
        rows = [split.num_queries if report.kind == "retrieval" else split.num_items for split in report.splits]
        with progress_bar("near queries", sum(rows)) as bar:
            leaks += near_queries(contents.texts_of, contents.ids_of, near, bar)
    samples = (
        ("queries", contents.queries, backbone.query_prefix, backbone.max_query_tokens),
        ("passages", contents.passages, backbone.passage_prefix, backbone.max_passage_tokens),
    )
    with progress_bar("lengths", sum(len(sample.texts) for _, sample, _, _ in samples)) as bar:
        lengths = [
            measure_lengths(side, sample, _counter(tokens, prefix), limit, bar)
            for side, sample, prefix, limit in samples
        ]
    languages: list[Languages | None] = []
    for side, sample, _, _ in samples:  # drawn, because a sample's first texts tend to be the first of the file
        texts = random.Random(seed).sample(sample.texts, min(_NUM_LANGUAGE_TEXTS, len(sample.texts)))
        languages.append(guess_languages(side, texts))
    return replace(
        report,
        path=str(data),
        leaks=tuple(leaks),
        lengths=tuple(length for length in lengths if length),
        languages=tuple(language for language in languages if language),
        settings={"tokenizer": tokenizer, "near": near, "sample_size": sample_size, "seed": seed},
    )


def _backbone_of(name: str) -> tuple[BackboneConfig, str]:
    """The backbone's configuration with its length limits, and the location of the tokenizer."""
    folder = find_shipped(name, "students") or Path(name).expanduser()
    if (folder / MANIFEST).is_file():
        config = StudentConfig.model_validate(read_manifest(folder, KIND, FORMAT_VERSION)["config"]).backbone
        backbone = config.model_copy(update={"max_query_tokens": search_query_tokens(config)})
    else:
        backbone = BackboneConfig(model=name)
    # A tokenizer beside a student is enough: the backbone's weights are not needed.
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return backbone, str(folder) if has_tokenizer else find_model(backbone.model)


def _counter(tokenizer: PreTrainedTokenizerBase, prefix: str) -> CountTokens:
    def count(texts: Sequence[str]) -> list[int]:
        encoded = tokenizer([prefix + text for text in texts], truncation=False, verbose=False)
        return [len(ids) for ids in cast("list[list[int]]", encoded["input_ids"])]

    return count
