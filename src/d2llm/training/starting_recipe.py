"""The verb ``init``: a recipe to start from, with the reasons for its values, from what a data set holds."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d2llm.core.errors import InputError, MissingExtraError
from d2llm.core.recipe import BackboneConfig, PoolingConfig, Recipe, StudentConfig, TeacherConfig, TrainingConfig
from d2llm.core.recipe_file import load_recipe_text
from d2llm.core.types import Task
from d2llm.data.beir import Dataset
from d2llm.data.check_texts import Sample, guess_languages
from d2llm.data.open_data import open_data
from d2llm.data.pairs import PairDataset
from d2llm.models.sources import readable_tokens
from d2llm.models.student import Student
from d2llm.ops.batching import even_batches
from d2llm.training.fit_evidence import LISTED_DEPTH, LISTED_PASSAGES
from d2llm.training.training_run import epochs_of

_log = logging.getLogger(__name__)
_SAMPLE, _TIMED, _TOLD = (
    2000,
    64,
    500,
)  # texts whose length is measured, that are read against the clock, in which language
_TRAINING = TrainingConfig()
_BATCH = _TRAINING.batch_queries
_MOST_PASSAGE_TOKENS, _MOST_QUERY_TOKENS = (
    256,
    128,
)  # longer ones cost time in proportion; who needs them may ask for them
_ENGLISH = frozenset({"minilm", "smollm2"})
_ENOUGH_FOR_A_TEACHER = 1000
_ALIKE = 1.5
_TRAINING_PASSES = 4  # a text in training costs as much as reading it so often: twice forward, once backward


@dataclass(frozen=True, slots=True)
class StartingRecipe:
    """A recipe as TOML with comments, what was chosen from, and what its reader should know besides.

    ``minutes`` is a guess of how long mining and training will take here, from how fast some texts were read.
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
        """What the text says."""
        return load_recipe_text(self.text, where=f"the starting recipe of {self.name}")


@dataclass(frozen=True, slots=True)
class _Side:
    """Queries or passages: tokens of those that were sampled, the limit that suits them, and their language."""

    lengths: np.ndarray
    limit: int
    language: str | None

    @property
    def kept(self) -> np.ndarray:
        return np.minimum(self.lengths, self.limit)

    @property
    def longer(self) -> float:
        return float((self.lengths > self.limit).mean())


def starting_recipe(
    data: str | Path,
    *,
    backbone: str = "minilm",
    teacher: str | None = None,
    task: Task | None = None,
    device: str | None = None,
    seed: int = 0,
) -> StartingRecipe:
    """A recipe for one data set: limits from its texts, epochs from the number of its questions, a teacher if it pays.

    Args:
        data: what ``open_data`` reads, with judged questions (or pairs) in train and dev.
        backbone: the model that reads each text alone.
        teacher: a model that judges pairs; by default the one that so many questions can make, or none.
        task: by default ``asymmetric`` (a passage answers), unless queries and passages are of about one length.
        device: by default what this machine has.
        seed: of the samples.

    Raises:
        InputError: there are no training questions, or no dev questions to choose the best state by.
        DataFormatError: the data cannot be read.
        ModelNotFoundError: there is no such backbone.
    """
    dataset = open_data(data)
    num_train, num_left, num_dev = _count(dataset)
    student = Student.create(
        StudentConfig(backbone=BackboneConfig(model=backbone), pooling=PoolingConfig(method="backbone")), device=device
    )
    texts = _texts(dataset, seed)
    queries, passages = (
        _side(student, of_side, most, prefix)
        for of_side, most, prefix in zip(
            texts,
            (_MOST_QUERY_TOKENS, _MOST_PASSAGE_TOKENS),
            (student.config.backbone.query_prefix, student.config.backbone.passage_prefix),
            strict=True,
        )
    )
    alike = float(np.median(passages.lengths)) < _ALIKE * float(np.median(queries.lengths))
    chosen: Task = task or ("symmetric" if alike else "asymmetric")
    num_passages = len(dataset.passages) if isinstance(dataset, Dataset) else len(texts[1].texts)
    shared = 2 * num_left < num_train
    used = num_train if shared else num_left
    epochs = epochs_of(_TRAINING, even_batches(used, _BATCH)[0])
    notes = list(_notes(backbone, queries, passages, num_dev))
    minutes = _minutes(student, texts[1], queries, passages, num_passages, used * epochs, num_dev)
    name = Path(dataset.name).name or "mine"
    text = "\n\n".join(
        [
            _head(name, data, dataset, num_train, num_dev, minutes, student),
            _backbone_section(student.config.backbone, queries, passages),
            *_teacher_sections(teacher, backbone, used),
            _data_section(data, chosen, alike, task is not None, shared, num_train, num_left),
            _training_section(used, epochs, num_dev),
            _residual_section(),
            _evidence_section(),
        ]
    )
    result = StartingRecipe(
        text + "\n", name, num_train, num_left, num_dev, num_passages, chosen, minutes, tuple(notes)
    )
    _ = result.recipe  # it must be one
    return result


def _count(dataset: Dataset | PairDataset) -> tuple[int, int, int]:
    """Training questions (or pairs), those of them that share no positive with dev or test, and dev questions."""
    if isinstance(dataset, PairDataset):
        counts = {split: len(pairs) for split, pairs in dataset.splits.items()}
        num_train, num_dev = counts.get("train", 0), counts.get("dev", 0)
        _require(dataset.path, num_train, num_dev, "train.jsonl", "dev.jsonl", "pairs")
        return num_train, num_train, num_dev
    positives = {
        split: [ids for ids in dataset.positives(split).values() if ids] if split in dataset.qrels else []
        for split in ("train", "dev", "test")
    }
    num_train, num_dev = len(positives["train"]), len(positives["dev"])
    _require(dataset.path, num_train, num_dev, "qrels/train.tsv", "qrels/dev.tsv", "queries with a positive")
    reserved = {passage_id for split in ("dev", "test") for ids in positives[split] for passage_id in ids}
    return num_train, sum(reserved.isdisjoint(ids) for ids in positives["train"]), num_dev


def _require(path: Path, num_train: int, num_dev: int, train: str, dev: str, what: str) -> None:
    if not num_train:
        raise InputError(f"{path}: {train} has no {what}, so there is nothing to train on; put judged ones there")
    if not num_dev:
        raise InputError(
            f"{path}: {dev} has no {what}, and training needs some to choose its best state by; move about a fifth of "
            f"the {num_train:,} in {train} there ({max(1, num_train // 5):,}), no question in both"
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


def _side(student: Student, sample: Sample, most: int, prefix: str) -> _Side:
    """Lengths in the backbone's tokens, and the limit that cuts no more than one text in twenty, or the most."""
    prefixed = [prefix + text for text in sample.texts]
    encoded = student.backbone.tokenizer(prefixed, truncation=False, verbose=False)["input_ids"]
    lengths = np.array([max(1, len(ids)) for ids in encoded])  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    readable = readable_tokens(student.backbone.model.config) or most
    limit = min(most, readable, max(32, 16 * math.ceil(float(np.percentile(lengths, 95)) / 16)))
    try:
        languages = guess_languages("texts", sample.texts[:_TOLD])
    except MissingExtraError:
        languages = None
    return _Side(lengths, limit, next(iter(languages.counts)) if languages else None)


def _notes(backbone: str, queries: _Side, passages: _Side, num_dev: int) -> Sequence[str]:
    notes: list[str] = []
    language = passages.language or queries.language
    if language is None:
        notes.append("the language was not told: that needs the extra `check`")
    elif language != "en" and backbone in _ENGLISH:
        notes.append(
            f"the texts look like '{language}', and {backbone} reads English: name a model of that language with "
            "--backbone, such as e5 (multilingual-e5-small, MIT)"
        )
    if num_dev < 50:
        notes.append(f"dev has {num_dev} judged questions or pairs: a small gain cannot be seen with so few; 100 can")
    if passages.longer > 0.2:
        notes.append(
            f"{passages.longer:.0%} of the passages are longer than {passages.limit} tokens and lose their end: raise "
            "max_passage_tokens if the model can read more, or split the texts"
        )
    return notes


def _minutes(
    student: Student, sample: Sample, queries: _Side, passages: _Side, num_passages: int, num_seen: int, num_dev: int
) -> float:
    """How long mining, training and looks at dev will take, by the speed at which some passages are read here."""
    timed = sample.texts[:_TIMED]
    student.encode_passages(timed[:4])
    start = time.perf_counter()
    student.encode_passages(timed)
    read = float(np.minimum(passages.lengths[: len(timed)], student.config.backbone.max_passage_tokens).sum())
    rate = read / (time.perf_counter() - start)
    query, passage = float(queries.kept.mean()), float(passages.kept.mean())
    of_batch = _BATCH * query + min(num_passages, _BATCH * (1 + _TRAINING.num_hard + _TRAINING.num_easy)) * passage
    training = num_seen / _BATCH * of_batch * _TRAINING_PASSES
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
    what = "questions" if isinstance(dataset, Dataset) else "pairs"
    device, dtype = student.backbone.device, str(student.backbone.compute_dtype).removeprefix("torch.")
    return f"""\
# A recipe to start from, written by `d2llm init` for {data}: {num_train:,} {what} to train on, {num_dev:,} of dev.
# On the machine that wrote it ({device}, {dtype}) mining and training should take about {_in_words(minutes)}.
# Every other setting has its default: docs/training.md says which to turn first. Train with:
#   d2llm run THIS_FILE

name = {json.dumps(name, ensure_ascii=False)}
seed = 0"""


def _in_words(minutes: float) -> str:
    if minutes < 1.5:
        return "a minute"
    return f"{minutes:,.0f} minutes" if minutes < 90 else f"{minutes / 60:,.1f} hours"


def _backbone_section(backbone: BackboneConfig, queries: _Side, passages: _Side) -> str:
    language_code = passages.language or queries.language
    english = " It reads English." if backbone.model in _ENGLISH else ""
    language = f" The texts look like '{language_code}'." if language_code else ""
    prefixes = ""
    if backbone.query_prefix or backbone.passage_prefix:
        prefixes = f"""
query_prefix = {json.dumps(backbone.query_prefix)} # it was trained with these before its texts
passage_prefix = {json.dumps(backbone.passage_prefix)}"""
    return f"""\
[student.backbone]
model = {json.dumps(backbone.model)} # reads each text alone.{english}{language}{prefixes}
lora = {{ dropout = 0.0 }} # a quarter faster on a CPU, and so short a run does not need it
max_query_tokens = {queries.limit} # {_lengths(queries, "queries")}
max_passage_tokens = {passages.limit} # {_lengths(passages, "passages")}; time and memory grow with it"""


def _lengths(side: _Side, what: str) -> str:
    middle, long = int(np.median(side.lengths)), int(np.percentile(side.lengths, 95))
    return f"half of the {what} have up to {middle} tokens, 95 % up to {long}; {side.longer:.0%} are cut"


def _teacher_sections(teacher: str | None, backbone: str, num_train: int) -> list[str]:
    """Teacher and losses: the one that is named, one that so many questions can make, or the judgements alone."""
    if teacher is not None:
        named = TeacherConfig().named(teacher)
        return [
            f"""\
[teacher] # tried against the cosine on dev before it may teach (`d2llm gate`)
model = {json.dumps(named.model)}
kind = "{named.kind}"

[teacher_tuning]
epochs = 0 # the teacher as it is; with some thousand questions tuning pays: 1""",
            _TAUGHT,
        ]
    if num_train >= _ENOUGH_FOR_A_TEACHER:
        return [
            f"""\
[teacher] # {num_train:,} questions can make one: a cross-encoder of the backbone, stacked with the tuned cosine
model = {json.dumps(backbone)}
kind = "classifier"
new_head = true
stack_with_cosine = true

[teacher_tuning]
tuning = "full"
loss = "lists"
learning_rate = 1e-4
batch_pairs = 80

[gate]
queries = 100
depth = 12
alpha = 0.9 # closed where the teacher is behind the cosine on dev: the judgements alone teach there""",
            _TAUGHT,
        ]
    return [
        f"""\
# No teacher: {num_train:,} questions are too few to tune a small one that is better than the cosine (docs/LOG.md), and
# one that is behind it teaches nothing. A teacher that judges well as it is, a reranker or a large language
# model, is worth having: `d2llm init DATA --teacher MODEL` writes a recipe with it.
[losses]
contrastive_imitation = 0.0
rank_imitation_positive_hard = 0.0
rank_imitation_hard_easy = 0.0
feature_imitation = 0.0
in_batch_cross_entropy = 1.0 # the data set's own positives above all other passages of the batch"""
    ]


_TAUGHT = """\
[losses] # by halves from the teacher's distribution over the candidates and from the data set's own judgements
contrastive_imitation = 0.0
list_imitation = 0.5
rank_imitation_positive_hard = 0.0
rank_imitation_hard_easy = 0.0
feature_imitation = 0.0
in_batch_cross_entropy = 0.5"""


def _data_section(
    data: str | Path, task: Task, alike: bool, is_asked: bool, shared: bool, num_train: int, num_left: int
) -> str:
    meaning = "a passage says the same as a query" if task == "symmetric" else "a passage answers a query"
    other = "asymmetric" if task == "symmetric" else "symmetric"
    if is_asked:
        reason = "as asked"
    elif alike:
        reason = f"queries and passages are of about one length; {other} if a passage answers instead"
    else:
        reason = f"{other} if it should say the same instead"
    lines = [
        "[[data]]",
        f"path = {json.dumps(str(data), ensure_ascii=False)}",
        f'task = "{task}" # {meaning}: {reason}',
    ]
    if shared:
        lines.append(
            f"exclude_shared_passages = false # only {num_left:,} of {num_train:,} questions share no right passage "
            "with dev or test:\n# dev then measures questions that training has not seen, but not unseen passages"
        )
    return "\n".join(lines)


def _training_section(num_train: int, epochs: int, num_dev: int) -> str:
    per_epoch, _ = even_batches(num_train, _BATCH)
    rate, of_heads = _TRAINING.learning_rate, _TRAINING.head_learning_rate
    return f"""\
[training] # the best state on dev is kept, so an epoch too many costs time alone
learning_rate = {rate:g} # "nothing was learnt": a third of it if dev fell, three times as much if it stood still
head_learning_rate = {of_heads:g} # ten times as much saturates the interaction within a hundred steps
warmup_fraction = {_TRAINING.warmup_fraction:g} # of the steps
epochs = {epochs} # {num_train:,} questions make {per_epoch:,} steps an epoch: {per_epoch * epochs:,} in all
batch_queries = {_BATCH}
num_hard = {_TRAINING.num_hard} # negatives of a query in a step, drawn anew each epoch from those that were mined
num_easy = {_TRAINING.num_easy}
dev_queries = {min(num_dev, _TRAINING.dev_queries)} # of {num_dev:,}
dev_passages = {_TRAINING.dev_passages} # to rank: the right ones, BM25's first ten of each, others up to this number"""


def _residual_section() -> str:
    return """\
[training.residual] # then the interaction alone, on vectors that are read once; its weight is chosen on dev, 0 allowed
epochs = 3"""


def _evidence_section() -> str:
    return """\
[evidence] # what BM25 adds to the score in an index: weighed on dev at the end, and left out where it is worth nothing
words = true
window_words = true # of each two neighbouring sentences: what counts where passages are long
window_vectors = false # their vectors: a little better on long passages, which an index then reads three times"""
