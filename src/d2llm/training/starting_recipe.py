"""The verb ``init``: writes a starting recipe for a data set, with the reasons for its values."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from d2llm.core.errors import InputError, MissingExtraError
from d2llm.core.names import counted
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.check import Sample, guess_languages
from d2llm.data.open_data import open_data
from d2llm.data.pairs import PairDataset
from d2llm.models.layer_choice import choose_layers, layer_distances
from d2llm.models.length_limit import readable_tokens
from d2llm.models.pretrained import is_decoder, keep_layers
from d2llm.models.protocols import task_for
from d2llm.models.student import Student
from d2llm.ops.batching import even_batches
from d2llm.recipe import AutoPooling, BackboneConfig, DataConfig, Recipe, StudentConfig, TrainingConfig
from d2llm.recipe.recipe import load_recipe_text, named_teacher
from d2llm.training.checkpoints import usual_epochs
from d2llm.training.fit_score_features import LISTED_DEPTH
from d2llm.training.settings import LISTED_PASSAGES

_SAMPLE = 2000  # texts whose length is measured
_TIMED = 64  # texts that are encoded to measure the speed
_LANGUAGE_SAMPLE = 500  # texts whose language is guessed
_TRAINING = TrainingConfig()
_RATE, _BATCH, _NUM_HARD, _NUM_EASY = 1e-3, 16, 4, 1  # for 100 to 1,000 questions (docs/log)
_MAX_PASSAGE_TOKENS, _MAX_QUERY_TOKENS = 256, 128  # time grows with the limits; users can raise them in the recipe
_READ_BY_LAYERS = 100  # passages by which layers are chosen
_ENGLISH = frozenset({"minilm", "smollm2"})
_ENOUGH_FOR_A_TEACHER = 1000
_ALIKE = 1.5
_TRAINING_PASSES = 4  # cost of training on a text in forward passes: two forward and one backward pass


@dataclass(frozen=True, slots=True)
class StartingRecipe:
    """A recipe as TOML with comments, the counts that it is based on, and notes for the user.

    ``minutes`` estimates how long mining and training will take here, from the speed of encoding some texts.
    """

    text: str
    name: str
    num_train: int
    num_left: int
    num_dev: int
    num_passages: int
    task: Task
    minutes: float
    notes: tuple[str, ...]

    @property
    def duration(self) -> str:
        """``minutes`` in words."""
        return _in_words(self.minutes)

    @property
    def recipe(self) -> Recipe:
        """The recipe that ``text`` defines."""
        return load_recipe_text(self.text, where=f"the starting recipe of {self.name}")


@dataclass(frozen=True, slots=True)
class _Side:
    """A sample of queries or passages: their lengths in tokens, and a suitable limit."""

    lengths: np.ndarray
    limit: int

    @property
    def kept(self) -> np.ndarray:
        return np.minimum(self.lengths, self.limit)

    @property
    def longer(self) -> float:
        return float((self.lengths > self.limit).mean())


def starting_recipe(
    data: str | Path,
    *,
    backbone: str | None = None,
    start: str | Path | None = None,
    layers: int | None = None,
    teacher: str | None = None,
    task: Task | None = None,
    device: str | None = None,
    seed: int = 0,
) -> StartingRecipe:
    """A recipe for one data set: limits from its texts, epochs from the number of questions, a teacher if worthwhile.

    Args:
        data: anything that ``open_data`` reads, with judged questions (or pairs) in train and dev.
        backbone: the model that encodes each text alone; by default ``minilm``, or ``e5`` for texts that are not
            English.
        start: a student to train further, a folder or a name, instead of a backbone.
        layers: how many of the backbone's layers to keep: of an encoder those that turn the states of tokens most
            (``models.layer_choice``), of a decoder the first; by default all.
        teacher: a model that scores pairs; by default one trained on the questions if there are enough, or none.
        task: by default the one that ``start`` was trained for, if it is one; else ``asymmetric`` (a passage answers),
            unless queries and passages have about the same length.
        device: where to compute; by default the best device available.
        seed: seed of the samples.

    Raises:
        InputError: there are no training questions, or no dev questions for choosing the best state; or both a student
            to start from and a backbone or its layers are given; or the backbone has fewer layers.
        DataFormatError: the data cannot be read.
        ModelNotFoundError: there is no such backbone or student; or the backbone is a student.
    """
    if start is not None and (backbone is not None or layers is not None):
        raise InputError(f"the student '{start}' has a backbone already; give it alone, or the backbone alone")
    dataset = open_data(data)
    num_train, num_left, num_dev = _count(dataset)
    texts = _texts(dataset, seed)
    language = _language_of((texts[1].texts or texts[0].texts)[:_LANGUAGE_SAMPLE])
    if start is None:
        default = "minilm" if language == "en" else "e5"
        student = _untuned(backbone or default, layers, texts[1].texts, device)
    else:
        student = Student.load(start, device=device)
    encoder = student.config.backbone
    limits = (_MAX_QUERY_TOKENS, _MAX_PASSAGE_TOKENS)
    if start is not None:
        limits = (encoder.max_query_tokens, encoder.max_passage_tokens)
    queries, passages = (
        _side(student, sample, max_tokens, prefix, is_fixed=start is not None)
        for sample, max_tokens, prefix in zip(
            texts, limits, (encoder.query_prefix, encoder.passage_prefix), strict=True
        )
    )
    chosen, reason = _choose_task(student, task, queries, passages)
    num_passages = len(dataset.passages) if isinstance(dataset, Dataset) else len(texts[1].texts)
    shared = 2 * num_left < num_train
    used = num_train if shared else num_left
    epochs = usual_epochs(even_batches(used, _BATCH)[0])
    notes = list(_notes(encoder.model, language, passages, num_dev))
    minutes = _minutes(student, texts[1], queries, passages, num_passages, used * epochs, num_dev)
    name = Path(dataset.name).name or "mine"
    text = "\n\n".join(
        [
            _head(name, data, dataset, num_train, num_dev, minutes, student),
            *(
                [_backbone_section(encoder, language, queries, passages)]
                if start is None
                else [_student_sections(student.config, start, queries, passages), _mining_section(start)]
            ),
            *_teacher_sections(teacher, encoder.model, used, isinstance(dataset, PairDataset)),
            _data_section(data, chosen, reason, shared, num_train, num_left),
            _training_section(used, epochs, start),
            _SCORE_FEATURES,
        ]
    )
    result = StartingRecipe(
        text + "\n", name, num_train, num_left, num_dev, num_passages, chosen, minutes, tuple(notes)
    )
    _ = result.recipe  # check that the text is a valid recipe
    return result


def _untuned(model: str, num_layers: int | None, passages: Sequence[str], device: str | None) -> Student:
    """The backbone before training, by its cosine, with some of its layers."""
    config = StudentConfig(backbone=BackboneConfig(model=model), pooling=AutoPooling())
    student = Student.create(config, device=device)
    if num_layers is None:
        return student
    kept: int | tuple[int, ...] = num_layers
    if not is_decoder(student.backbone.model.config):
        kept = choose_layers(layer_distances(student.backbone, passages[:_READ_BY_LAYERS]), num_layers)
    keep_layers(student.backbone.model, kept, name=model)
    student.config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"layers": kept})})
    return student


def _choose_task(student: Student, task: Task | None, queries: _Side, passages: _Side) -> tuple[Task, str]:
    """The task, and why it is that one."""
    trained = student.trained_tasks
    if task is not None:
        return task_for(student, task), "as requested"
    if len(trained) == 1:
        return trained[0], "what the student to start from was trained for"
    if float(np.median(passages.lengths)) < _ALIKE * float(np.median(queries.lengths)):
        why = "queries and passages have about the same length; use asymmetric if a passage answers instead"
        return "symmetric", why
    return "asymmetric", "use symmetric if it should say the same instead"


def _count(dataset: Dataset | PairDataset) -> tuple[int, int, int]:
    """The numbers of training questions (or pairs), of those that share no positive with dev or test, and of dev."""
    if isinstance(dataset, PairDataset):
        counts = {split: len(pairs) for split, pairs in dataset.splits.items()}
        num_train, num_dev = counts.get("train", 0), counts.get("dev", 0)
        _require(dataset.path, num_train, num_dev, "train.jsonl", "dev.jsonl", "pairs")
        return num_train, num_train, num_dev
    num_train, num_dev = (
        len(dataset.unshared_positives(split)) if split in dataset.qrels else 0 for split in ("train", "dev")
    )
    _require(dataset.path, num_train, num_dev, "qrels/train.tsv", "qrels/dev.tsv", "queries with a positive")
    held_out = [split for split in ("dev", "test") if split in dataset.qrels]
    return num_train, len(dataset.unshared_positives("train", held_out)), num_dev


def _require(path: Path, num_train: int, num_dev: int, train: str, dev: str, items: str) -> None:
    if not num_train:
        raise InputError(f"{path}: {train} has no {items}, so there is nothing to train on; put judged ones there")
    if not num_dev:
        raise InputError(
            f"{path}: {dev} has no {items}, which training needs for choosing the best state; move about a fifth of "
            f"the {num_train:,} in {train} there ({max(1, num_train // 5):,}), with no question in both"
        )


def _texts(dataset: Dataset | PairDataset, seed: int) -> tuple[Sample, Sample]:
    """Samples of the queries and the passages."""
    queries, passages = Sample(_SAMPLE, seed=seed), Sample(_SAMPLE, seed=seed)
    if isinstance(dataset, Dataset):
        for query in dataset.queries.values():
            queries.add(query.text)
        for passage in dataset.passages.values():
            passages.add(passage.full_text)
    else:
        for pair in (pair for pairs in dataset.splits.values() for pair in pairs):
            queries.add(pair.query)
            passages.add(pair.passage)
    return queries, passages


def _side(student: Student, sample: Sample, max_tokens: int, prefix: str, *, is_fixed: bool) -> _Side:
    """Measure lengths in the backbone's tokens; the limit truncates at most 5 % of the texts, up to ``max_tokens``.

    With ``is_fixed`` the limit is ``max_tokens``.
    """
    prefixed = [prefix + text for text in sample.texts]
    encoded = student.backbone.tokenizer(prefixed, truncation=False, verbose=False)["input_ids"]
    lengths = np.array([max(1, len(ids)) for ids in encoded])  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    readable = readable_tokens(student.backbone.model.config) or max_tokens
    limit = min(max_tokens, readable)
    if not is_fixed:
        limit = min(limit, max(32, 16 * math.ceil(float(np.percentile(lengths, 95)) / 16)))
    return _Side(lengths, limit)


def _language_of(texts: Sequence[str]) -> str:
    """The language of most texts; without the extra ``check``, "en" or, of other letters than Latin, "not English"."""
    try:
        languages = guess_languages("texts", texts)
    except MissingExtraError:
        letters = [letter for text in texts for letter in text if letter.isalpha()]
        return "en" if 2 * sum(map(str.isascii, letters)) >= len(letters) else "not English"
    return next(iter(languages.counts)) if languages else "en"


def _notes(backbone: str, language: str, passages: _Side, num_dev: int) -> Sequence[str]:
    notes: list[str] = []
    if language != "en" and backbone in _ENGLISH:
        notes.append(
            f"the texts look like '{language}', but {backbone} is for English: name a model for that language with "
            "--backbone, such as e5 (multilingual-e5-small, MIT)"
        )
    if num_dev < 50:
        notes.append(f"dev has {num_dev} judged questions or pairs, too few to show a small gain; use 100 or more")
    if passages.longer > 0.2:
        notes.append(
            f"{passages.longer:.0%} of the passages are longer than {passages.limit} tokens and are truncated: raise "
            "max_passage_tokens if the model allows it, or split the texts"
        )
    return notes


def _minutes(
    student: Student, sample: Sample, queries: _Side, passages: _Side, num_passages: int, num_seen: int, num_dev: int
) -> float:
    """Estimate the time of mining, training and dev evaluations from the speed of encoding some passages here."""
    timed = sample.texts[:_TIMED]
    student.encode_passages(timed[:4])
    start = time.perf_counter()
    student.encode_passages(timed)
    num_tokens = float(np.minimum(passages.lengths[: len(timed)], student.config.backbone.max_passage_tokens).sum())
    rate = num_tokens / (time.perf_counter() - start)
    query, passage = float(queries.kept.mean()), float(passages.kept.mean())
    batch_tokens = _BATCH * query + min(num_passages, _BATCH * (1 + _NUM_HARD + _NUM_EASY)) * passage
    training = num_seen / _BATCH * batch_tokens * _TRAINING_PASSES
    dev = 6 * min(num_passages, max(_TRAINING.dev_passages, 10 * min(num_dev, _TRAINING.dev_queries))) * passage
    words = min(num_passages, max(LISTED_PASSAGES, LISTED_DEPTH * min(num_dev, _TRAINING.dev_queries))) * passage
    return (num_passages * passage + training + dev + words) / rate / 60


def _head(
    name: str,
    data: str | Path,
    dataset: Dataset | PairDataset,
    num_train: int,
    num_dev: int,
    minutes: float,
    student: Student,
) -> str:
    items = "questions" if isinstance(dataset, Dataset) else "pairs"
    device, dtype = student.backbone.device, str(student.backbone.compute_dtype).removeprefix("torch.")
    return f"""\
# A starting recipe, written by `d2llm init` for {data}: {num_train:,} {items} to train on, {num_dev:,} in dev.
# On the machine that wrote it ({device}, {dtype}) mining and training should take about {_in_words(minutes)}.
# Every other setting has its default. Train with:
#   d2llm run THIS_FILE

name = {json.dumps(name, ensure_ascii=False)}"""


def _in_words(minutes: float) -> str:
    if minutes < 1.5:
        return "a minute"
    return f"{minutes:,.0f} minutes" if minutes < 90 else f"{minutes / 60:,.1f} hours"


def _backbone_section(backbone: BackboneConfig, language: str, queries: _Side, passages: _Side) -> str:
    english = " It is for English." if backbone.model in _ENGLISH else ""
    is_default = backbone.model == BackboneConfig().model
    model = "" if is_default else f"\nmodel = {json.dumps(backbone.model)}"
    if backbone.layers is not None:
        kept = backbone.layers if isinstance(backbone.layers, int) else [*backbone.layers]
        model += f"\nlayers = {kept} # those that turn the states of tokens most, or a decoder's first"
    english += f" The texts look like '{language}'."
    return f"""\
[student.backbone] # {Path(backbone.model).name} encodes each text alone.{english}{model}
max_query_tokens = {queries.limit} # {_lengths(queries, "queries")}
max_passage_tokens = {passages.limit} # {_lengths(passages, "passages")}; time and memory grow with it"""


def _student_sections(config: StudentConfig, start: str | Path, queries: _Side, passages: _Side) -> str:
    """The settings of the student to start from that are not the defaults; a training from it must have them all."""
    model, sections = config.backbone.model, list[str]()
    defaults = StudentConfig(backbone=BackboneConfig(model=model)).model_dump(mode="json")
    defaults["backbone"]["model"] = BackboneConfig().model
    for section, values in config.model_dump(mode="json").items():
        usual = defaults[section] if values.get("kind") == defaults[section].get("kind") else {}
        changed = {name: value for name, value in values.items() if name not in usual or value != usual[name]}
        if changed:
            sections.append(f"[student.{section}]\n{_toml_lines(changed)}")
    return f"""\
# The settings of '{start}', which a training that starts from it cannot change.
# It cuts queries to {queries.limit} tokens: {_lengths(queries, "queries")};
# and passages to {passages.limit}: {_lengths(passages, "passages")}.
""" + "\n\n".join(sections)


def _toml_lines(values: Mapping[str, object]) -> str:
    """The settings of a section, one in a line."""
    return "\n".join(f"{name} = {_toml(value)}" for name, value in values.items() if value is not None)


def _toml(value: object) -> str:
    """A value of a recipe as TOML writes it."""
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in items if item is not None) + " }"
    return json.dumps(value, ensure_ascii=False)


def _mining_section(start: str | Path) -> str:
    return f"""\
[mining]
student = {json.dumps(str(start))} # near misses of the student itself, not of its backbone"""


def _lengths(side: _Side, kind: str) -> str:
    middle, long = int(np.median(side.lengths)), int(np.percentile(side.lengths, 95))
    return f"half of the {kind} have up to {middle} tokens, 95 % up to {long}; {side.longer:.0%} are truncated"


def _teacher_sections(teacher: str | None, backbone: str, num_train: int, of_pairs: bool) -> list[str]:
    """The named teacher, else one trained on the questions if they are enough, else losses that need none."""
    if teacher is not None:
        named = named_teacher(teacher)
        given = {"model": named.model, "kind": named.kind} | named.model_dump(mode="json", exclude_unset=True)
        return [
            f"""\
[teacher] # tested against the cosine on dev before its labels are used (`d2llm gate`)
{_toml_lines(given)}

[teacher_tuning]
epochs = 0 # the teacher as it is; with a few thousand questions tuning is worthwhile: 1""",
        ]
    if num_train >= _ENOUGH_FOR_A_TEACHER:
        return [
            f"""\
[teacher] # {num_train:,} questions are enough for one: a cross-encoder of the backbone, combined with the tuned cosine
model = {json.dumps(backbone)}
kind = "classifier"
new_head = true
ensemble_with_cosine = true

[teacher_tuning]
tuning = "full"
loss = "lists"
learning_rate = 1e-4
batch_pairs = 80

[gate]
queries = 100
depth = 12
alpha = 0.9 # closed if the teacher is worse than the cosine on dev: then only the judgements are used""",
        ]
    loss = "pair_cross_entropy = 1.0" if of_pairs else "in_batch_cross_entropy = 1.0"
    meaning = "yes or no" if of_pairs else "rank the data set's own positives above all other passages of the batch"
    return [
        f"""\
# No teacher: {num_train:,} questions are too few to tune a small one that is better than the cosine, and a
# worse one does not help. A teacher that scores well without tuning, such as a reranker or a large language model,
# does help: `d2llm init DATA --teacher MODEL` writes a recipe with it.
[losses]
{loss} # {meaning}"""
    ]


def _data_section(data: str | Path, task: Task, reason: str, shared: bool, num_train: int, num_left: int) -> str:
    meaning = "a passage says the same as a query" if task == "symmetric" else "a passage answers a query"
    default = task == DataConfig.model_fields["task"].default
    lines = [
        f"[[data]] # {task}, {meaning}: {reason}",
        f"path = {json.dumps(str(data), ensure_ascii=False)}",
        *([] if default else [f'task = "{task}"']),
    ]
    if shared:
        lines.append(
            f"exclude_shared_passages = false # only {num_left:,} of {num_train:,} questions share no relevant passage "
            "with dev or test:\n# dev then measures questions that training has not seen, but not unseen passages"
        )
    return "\n".join(lines)


def _training_section(num_train: int, epochs: int, start: str | Path | None) -> str:
    started = "" if start is None else f"\nstart = {json.dumps(str(start))} # a student, which is trained further"
    per_epoch, _ = even_batches(num_train, _BATCH)
    return f"""\
[training] # the best state on dev is kept, so an epoch too many only costs time{started}
learning_rate = {_RATE:g} # if "nothing was learnt": a third of it if dev fell, three times as much if dev hardly moved
epochs = {epochs} # {num_train:,} questions make {counted(per_epoch, "step")} per epoch: {per_epoch * epochs:,} in all
batch_queries = {_BATCH}
num_hard = {_NUM_HARD} # negatives of a query in a step, drawn again each epoch from those that were mined
num_easy = {_NUM_EASY}"""


_SCORE_FEATURES = """\
[score_features] # part of the score in an index: the weights are fitted on dev at the end, and 0 if they do not help
bm25 = true
window_bm25 = true # BM25 of each two neighbouring sentences, which helps if passages are long
maxsim = true # vectors of single tokens, which see more than the passage's one vector; 32 bytes each"""
