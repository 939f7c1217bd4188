"""The verb ``data check``: what is in a data set, and whether its splits are apart."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from d2llm.core.errors import InputError
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.manifest import read_manifest
from d2llm.core.progress import progress_bar
from d2llm.core.recipe import BackboneConfig, StudentConfig
from d2llm.core.shipped import shipped_models
from d2llm.data.check import read_through
from d2llm.data.check_leaks import near_queries
from d2llm.data.check_report import DataReport
from d2llm.data.check_texts import CountTokens, Sample, guess_languages, measure_lengths
from d2llm.data.open_data import open_source
from d2llm.models.sources import find_model, load_tokenizer
from d2llm.models.student_files import FORMAT_VERSION, KIND

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_NUM_LANGUAGE_TEXTS = 1000


def check_data(
    data: str | Path,
    *,
    tokenizer: str = "d2llm-minilm",
    near: float = 0.8,
    sample_size: int = 50_000,
    seed: int = 0,
    show_progress: bool | None = None,
) -> DataReport:
    """Count what is in a data set, and look for leaks between its splits, repeated texts, long texts and languages.

    The texts are read as a stream: memory grows with ids and hashes, not with the texts of a corpus.

    Args:
        data: what ``open_data`` reads.
        tokenizer: whose tokens count, and whose limits: a student (shipped, or its folder), or else a model's name, a
            model's folder or a tokenizer's folder, with the limits of a new student.
        near: least Jaccard similarity of the character trigrams of two near queries, in (0, 1]; 1 looks for none.
        sample_size: queries and passages whose length is measured; 1,000 of them have their language told.
        seed: of the samples.
        show_progress: None means: if standard error is a terminal.

    Raises:
        DataFormatError: no such data, or malformed data (names file and line).
        DuplicateIdError: an id, or a judged pair, occurs twice.
        InputError: ``near`` or ``sample_size`` out of range.
        ModelNotFoundError: there is no such tokenizer.
        MissingExtraError: datasketch, py3langid or the `datasets` library is needed and not installed.
    """
    if not 0 < near <= 1:
        raise InputError(f"near is {near}, but must be above 0 and at most 1")
    if sample_size < 1:
        raise InputError(f"sample_size is {sample_size}, but must be at least 1")
    backbone, location = _backbone_of(tokenizer)
    tokens = load_tokenizer(location)  # before the long reading, so that a wrong name fails at once
    source = open_source(data)
    contents = read_through(source, sample_size=sample_size, seed=seed)
    for issue in contents.issues:
        _log.warning("%s: %s", data, issue)
    leaks = list(contents.leaks)
    if near < 1:
        rows = [split.num_queries if contents.kind == "retrieval" else split.num_items for split in contents.splits]
        with progress_bar("near queries", sum(rows), show=show_progress) as bar:
            leaks += near_queries(contents.texts_of, contents.ids_of, near, bar)
    samples = (
        ("queries", contents.queries, backbone.query_prefix, backbone.max_query_tokens),
        ("passages", contents.passages, backbone.passage_prefix, backbone.max_passage_tokens),
    )
    with progress_bar("lengths", sum(len(sample.texts) for _, sample, _, _ in samples), show=show_progress) as bar:
        lengths = [
            measure_lengths(what, sample, _counter(tokens, prefix), limit, bar)
            for what, sample, prefix, limit in samples
        ]
    languages = [guess_languages(what, _draw(sample, seed)) for what, sample, _, _ in samples]
    return DataReport(
        source.name,
        str(data),
        contents.kind,
        contents.num_queries,
        contents.num_passages,
        contents.splits,
        contents.repeats,
        tuple(leaks),
        contents.shared_positives,
        tuple(length for length in lengths if length),
        tuple(language for language in languages if language),
        contents.issues,
        {"tokenizer": tokenizer, "near": near, "sample_size": sample_size, "seed": seed},
    )


def _backbone_of(name: str) -> tuple[BackboneConfig, str]:
    """The limits to measure against, and where the tokenizer is."""
    folder = shipped_models("students").get(name, Path(name).expanduser())
    if (folder / MANIFEST).is_file():
        # A student's folder has its tokenizer, so that the backbone's weights are not needed.
        config = StudentConfig.model_validate(read_manifest(folder, KIND, FORMAT_VERSION)["config"])
        return config.backbone, str(folder)
    is_tokenizer = (folder / "tokenizer.json").is_file()
    return BackboneConfig(model=name), str(folder) if is_tokenizer else find_model(name)


def _counter(tokenizer: PreTrainedTokenizerBase, prefix: str) -> CountTokens:
    def count(texts: Sequence[str]) -> list[int]:
        encoded = tokenizer([prefix + text for text in texts], truncation=False, verbose=False)
        return [len(ids) for ids in cast("list[list[int]]", encoded["input_ids"])]

    return count


def _draw(sample: Sample, seed: int) -> list[str]:
    """Some texts of a sample, whose first ones are more often the first of the file."""
    return random.Random(seed).sample(sample.texts, min(_NUM_LANGUAGE_TEXTS, len(sample.texts)))
