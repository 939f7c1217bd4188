"""``size --measure``: the speeds of this machine, in about two minutes."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (faiss ships no types)

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2llm.core.machine import available_memory, resident_memory
from d2llm.core.progress import progress_bar
from d2llm.core.types import DEFAULT_NUM_CANDIDATES, Passage, ScoreFeature, Task
from d2llm.models.protocols import task_for
from d2llm.models.student import Student
from d2llm.models.teachers.pair_teacher import PairTeacher
from d2llm.ops.kernels import BM25, MAXSIM, MIN_PARTS
from d2llm.retrieval.build_ann import empty_graph
from d2llm.retrieval.local_segment import open_view
from d2llm.retrieval.open_index import PART_FORMATS
from d2llm.retrieval.search import Searcher
from d2llm.retrieval.segments import IndexView
from d2llm.retrieval.settings import SearchSettings, SourceName
from d2llm.sizing.speeds import GRAPH_ROWS, Speed, Speeds, TeacherSpeed, processor_name
from d2llm.sizing.texts import count_postings, word_queries, write_passages
from d2llm.store.bm25 import WordIndex
from d2llm.store.index_spec import FORMATS, StoredSpec
from d2llm.store.index_store import IndexStore
from d2llm.store.part_vectors import PartVectors
from d2llm.store.scan import RowScan, load_faiss
from d2llm.store.shards import Storage
from d2llm.store.vector_formats import VectorFormat, make_format
from d2llm.store.word_segment import WordSegment

_SCANNED_BYTES = 256 << 20  # of vectors: more than a processor's caches, little enough for a small machine
_SCANNED_ROWS = 1 << 20
_DISTINCT_VECTORS = 4_096
_CANDIDATES = DEFAULT_NUM_CANDIDATES
_FARTHER = 3  # a search of a graph keeps so many times as many rows in view (``build_ann``)
_ENCODED_PASSAGES = 256
_WORD_PASSAGES = 2_000
_WORD_ROWS, _WORD_SEGMENTS = 1 << 16, 8
_WRITTEN_PASSAGES = 20_000
_WORD_TERMS: dict[ScoreFeature, float] = {"bm25": 0.1, "window_bm25": 0.1}
_LATENT_DIM, _NOISE = 24, 2.0  # of vectors as near to each other as those of passages
_TOKEN_ROWS, _TOKENS_OF_ROW = MIN_PARTS, 128
_TIMED_PAIRS = 40
_MIN_QUERIES = 100
_GRAPH_QUERIES = 64

Advance = Callable[[int], object]


def measure_speeds(
    student: Student,
    passages: Sequence[Passage],
    *,
    task: Task | None = None,
    queries: Sequence[str] | None = None,
    teachers: Mapping[str, Callable[[], PairTeacher]] | None = None,
    seconds: float = 1.5,
) -> Speeds:
    """Measure this machine, one core at a time; only passages are encoded on all of torch's threads.

    Times are those of the processor, so that other work on the machine matters little, but for ``slow_ratio``.

    Args:
        student: the student whose texts are encoded.
        passages: typical ones.
        task: in which the student's score is measured; by default what it was trained for.
        queries: typical ones; by default words in a row of the passages.
        teachers: functions that load the teachers to measure, by the name that a plan gives them.
        seconds: how long each speed is measured.
    """
    measuring = _Measuring(student, passages, queries, task_for(student, task), seconds)
    speeds = measuring.speeds()
    teacher_speeds = {name: measuring.teacher(load()) for name, load in (teachers or {}).items()}
    return speeds.model_copy(update={"teachers": teacher_speeds})


class _Measuring:
    """A student, some texts, and the ways to measure what a search does with them."""

    def __init__(
        self,
        student: Student,
        passages: Sequence[Passage],
        queries: Sequence[str] | None,
        task: Task,
        seconds: float,
    ) -> None:
        self.student = student
        self.texts = [passage.full_text for passage in passages]
        self.passages = [replace(passage, metadata={}) for passage in passages]
        self.queries = list(queries or word_queries(self.texts))
        self.task: Task = task
        self.seconds = seconds
        self.threads = torch.get_num_threads()
        self.process_bytes = resident_memory()
        self.random = np.random.default_rng(0)
        self.counts_tokens = "token" in student.feature_weights(task).part_kinds
        self.source = f"measured on this machine, {date.today().isoformat()}"

    def speeds(self) -> Speeds:
        """All speeds but those of teachers."""
        with progress_bar("measuring", 9 + len(FORMATS)) as advance:
            passage_tokens = self._speed(self._passage_tokens(), advance)
            with _one_thread():
                scans: dict[str, Speed] = {}
                products: dict[str, Speed] = {}
                for name in FORMATS:
                    scan, product = self._scan(make_format(name, self.student.vector_dim))
                    scans[name], products[name] = self._speed(scan, advance), self._speed(product)
                words = segment_ms, postings, candidate_words = self._words()
                pairs = self._interaction(advance)
                visited, linked = self._graph()
                result_ms, words_ms, written = self._index(scans["bfloat16"], products["bfloat16"], pairs, words)
                process = self.process_bytes
                return Speeds(
                    machine=processor_name(),
                    threads=self.threads,
                    student=self.student.fingerprint,
                    passage_tokens=passage_tokens,
                    query_ms=self._speed(self._query_ms(), advance),
                    scan_bytes=scans,
                    products=products,
                    visited_rows=self._speed(visited, advance),
                    segment_ms=self._speed(segment_ms),
                    words_ms=self._speed(words_ms),
                    postings=self._speed(postings, advance),
                    candidate_words=self._speed(candidate_words, advance),
                    compared_tokens=self._tokens(advance),
                    interaction_pairs=pairs,
                    result_ms=self._speed(result_ms, advance),
                    written_text_bytes=self._speed(written, advance),
                    linked_rows=self._speed(linked, advance),
                    slow_ratio=self._speed(self._slow_ratio()),
                    process_bytes=None if process is None else self._speed(process),
                )

    def teacher(self, teacher: PairTeacher) -> TeacherSpeed:
        """Pairs of one query and some passages each, as in labelling."""
        few = [(query, text) for query in self.queries[:2] for text in self.texts[: _TIMED_PAIRS // 2]]
        teacher.score_pairs(few[:2], self.task)
        begin = time.process_time()
        scores = teacher.score_pairs(few, self.task)
        seconds = time.process_time() - begin
        lengths = self.student.tokenize([text for _, text in few], "passage").lengths
        return TeacherSpeed(
            value=len(few) / seconds,
            source=self.source,
            pair_tokens=scores.num_tokens / len(few),
            passage_tokens=float(np.mean(lengths)),
        )

    def _speed(self, value: float, advance: Advance | None = None) -> Speed:
        if advance is not None:
            advance(1)
        return Speed(value=value, source=self.source)

    def _median(self, work: Callable[[Any], object], inputs: Iterable[Any], *, after_query: bool = False) -> float:
        """Median seconds of a core for a call; the inputs are taken in turns until the time is over.

        With ``after_query``, a query is encoded before each call, which leaves little in the processor's caches.
        """
        return float(np.median(self._times(work, inputs, after_query=after_query)))

    def _times(
        self,
        work: Callable[[Any], object],
        inputs: Iterable[Any],
        *,
        fewest: int = 3,
        clock: Callable[[], float] = time.process_time,
        after_query: bool = False,
    ) -> NDArray[np.float64]:
        endless = itertools.cycle(inputs)
        work(next(endless))  # one-time work is not counted
        times: list[float] = []
        until = time.perf_counter() + self.seconds
        while len(times) < fewest or time.perf_counter() < until:
            item = next(endless)
            if after_query:
                self._encode(self.queries[:1], is_query=True)
            begin = clock()
            work(item)
            times.append(clock() - begin)
        return np.array(times)

    def _encode(self, texts: Sequence[str], *, is_query: bool) -> NDArray[np.float32]:
        """Vectors of texts, with those of their tokens if the score counts them."""
        if self.counts_tokens:
            return self.student.encode_with_tokens(texts, "query" if is_query else "passage").vectors
        encode = self.student.encode_queries if is_query else self.student.encode_passages
        return encode(texts).vectors

    def _passage_tokens(self) -> float:
        texts = self.texts[:_ENCODED_PASSAGES]
        num_tokens = sum(self.student.tokenize(texts, "passage").lengths)
        return num_tokens / self._median(lambda block: self._encode(block, is_query=False), [texts])

    def _codes(self, vector_format: VectorFormat, num_rows: int) -> NDArray[np.uint8]:
        """The codes of random vectors, repeated."""
        random = self.random.standard_normal((_DISTINCT_VECTORS, vector_format.dim), np.float32)
        random *= vector_format.dim**0.5 / np.linalg.norm(random, axis=1, keepdims=True)
        codes = vector_format.encode(random, [""] * len(random))
        return np.tile(codes, (-(-num_rows // len(codes)), 1))[:num_rows]

    def _vectors(self, count: int, dim: int) -> NDArray[np.float32]:
        vectors = self.random.standard_normal((count, dim), np.float32)
        return vectors * np.float32(dim**0.5) / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _rows(self, num_rows: int) -> Iterator[NDArray[np.int64]]:
        """Some rows, ascending, as candidates are read; every time others, which are in no cache."""
        while True:
            yield np.sort(self.random.choice(num_rows, min(_CANDIDATES, num_rows), replace=False, shuffle=False))

    def _scan(self, vector_format: VectorFormat) -> tuple[float, float]:
        """Bytes of all vectors, and dimensions of single ones, a second.

        A search for the best of all reads the former and multiplies the best of them singly, once more.
        """
        most = min(_SCANNED_BYTES, (available_memory() or _SCANNED_BYTES) // 4)
        num_rows = min(_SCANNED_ROWS, most // vector_format.code_size)
        scan = RowScan(self._codes(vector_format, num_rows), vector_format)
        queries = self._vectors(8, vector_format.dim)
        rows = self._rows(num_rows)
        multiplied = self._median(lambda some_rows: scan.products(queries[0], some_rows), rows, after_query=True)
        search = self._median(
            lambda query: scan.search(query, _CANDIDATES, ids_of=lambda rows: rows.astype(str).tolist()), queries
        )
        scanned = num_rows * vector_format.code_size / max(search - multiplied, search / 2)
        return scanned, min(_CANDIDATES, num_rows) * vector_format.dim / multiplied

    def _query_ms(self) -> float:
        """Milliseconds to encode a query."""
        return 1e3 * self._median(lambda text: self._encode([text], is_query=True), self.queries)

    @cached_property
    def _small_segment(self) -> WordSegment:
        return WordSegment.from_texts(self.texts[:_WORD_PASSAGES])

    @cached_property
    def _large_segment(self) -> WordSegment:
        """The small one, repeated."""
        return WordSegment.join([self._small_segment] * -(-_WORD_ROWS // len(self._small_segment)))

    def _slow_ratio(self) -> float:
        """p99 over the median of the time by the clock to encode a query and find its passages by words."""
        index = WordIndex([self._large_segment])

        def search(text: str) -> None:
            self._encode([text], is_query=True)
            index.best(index.query(text), _CANDIDATES)

        times = self._times(search, self.queries, fewest=_MIN_QUERIES, clock=time.perf_counter)
        return float(np.percentile(times, 99) / np.median(times))

    def _words(self) -> tuple[float, float, float]:
        """Milliseconds for a segment, postings a second, and words of candidates a second."""
        small, large = self._small_segment, self._large_segment
        (few, little), (many, much) = self._best_of([small]), self._best_of([large])
        posting = max(much - little, much / 2) / (many - few)
        more, longer = self._best_of([small] * _WORD_SEGMENTS)
        segment = (longer - little - (more - few) * posting) / (_WORD_SEGMENTS - 1)
        index = WordIndex([large])
        pairs = list(zip(map(index.query, self.queries), self._rows(len(large)), strict=False))
        num_words = float(np.mean([large.lengths[rows].sum() for _, rows in pairs]))
        scored = self._median(lambda pair: index.score(*pair), pairs, after_query=True)
        return 1e3 * max(segment, little / 100), 1 / posting, num_words / scored

    def _best_of(self, segments: Sequence[WordSegment]) -> tuple[float, float]:
        """Mean postings that are read for a query in segments, and mean seconds to weigh it and find its passages."""
        index, kernels, num_best = WordIndex(segments), BM25.load(), _CANDIDATES // 2

        def best(query: str) -> int:
            weighed = index.query(query)
            if kernels is not None:
                return index.best_compiled(kernels, weighed, num_best)[2]
            index.best(weighed, num_best)
            return sum(count_postings(segment, weighed) for segment in segments)

        seconds = self._times(best, self.queries, fewest=len(self.queries), after_query=True)
        return sum(map(best, self.queries)) / len(self.queries), float(seconds.mean())

    def _tokens(self, advance: Advance) -> dict[str, Speed]:
        """Dimensions of candidates' tokens, a second, in the default format; nothing if the student has none."""
        projection = self.student.token_projection
        if projection is None:
            return {}
        name = PART_FORMATS["token"]
        vector_format = make_format(name, projection.dim)
        counts = np.full(_TOKEN_ROWS, _TOKENS_OF_ROW, np.int64)
        extents = np.stack([np.cumsum(counts) - counts, counts], axis=1)
        query = self._vectors(projection.max_query_tokens, projection.dim)
        MAXSIM.load()
        with TemporaryDirectory() as folder, (Path(folder) / "tokens").open("w+b") as file:
            file.write(self._codes(vector_format, int(counts.sum())).data)
            file.flush()
            codes = np.memmap(file, np.uint8, "r", shape=(int(counts.sum()), vector_format.code_size))
            token_vectors = PartVectors(extents, codes, vector_format)
            compared = self._median(
                lambda rows: token_vectors.sum_of_best(query, rows), self._rows(_TOKEN_ROWS), after_query=True
            )
        num_tokens = min(_CANDIDATES, _TOKEN_ROWS) * _TOKENS_OF_ROW
        return {name: self._speed(num_tokens * projection.dim / compared, advance)}

    def _interaction(self, advance: Advance) -> Speed | None:
        """Pairs a second, at full weight; None if the student has no interaction."""
        if not self.student.interaction.has_interaction(self.task):
            return None
        vectors = self._vectors(_CANDIDATES, self.student.vector_dim)
        weight = {"interaction_weight": 1.0} if self.student.has_dot else {}
        scored = self._median(lambda query: self.student.score(query, vectors, self.task, **weight), list(vectors[:8]))
        return self._speed(_CANDIDATES / scored, advance)

    def _graph(self) -> tuple[float, float]:
        """Rows that a search of an approximate index visits, a second, and rows that are linked while it is built.

        Once built, it is searched over stored vectors, as that of an index.
        """
        faiss: Any = load_faiss()
        vectors = self._similar_vectors(GRAPH_ROWS)
        graph = empty_graph(vectors[:_DISTINCT_VECTORS])
        begin = time.perf_counter()
        graph.add(vectors)
        linked = GRAPH_ROWS / (time.perf_counter() - begin)
        stored = make_format("bfloat16", self.student.vector_dim)
        scan = RowScan(stored.encode(vectors, [""] * len(vectors)), stored)
        if scan.faiss_index is not None:
            graph.storage.this.own(True)
            graph.own_fields, graph.storage = False, scan.faiss_index
        parameters = faiss.SearchParametersHNSW(efSearch=_FARTHER * _CANDIDATES)

        def search(query: NDArray[np.float32]) -> None:
            graph.search(stored.faiss_query(query), _CANDIDATES, params=parameters)

        queries = [*self._similar_vectors(_GRAPH_QUERIES)]
        faiss.cvar.hnsw_stats.reset()
        list(map(search, queries))
        visited = faiss.cvar.hnsw_stats.nhops / len(queries)
        return visited / self._median(search, queries, after_query=True), linked

    def _similar_vectors(self, count: int) -> NDArray[np.float32]:
        """Vectors near others, as those of passages are: of random ones, a search would compare three times as many."""
        dim = self.student.vector_dim
        topics = np.random.default_rng(0).standard_normal((_LATENT_DIM, dim), np.float32)
        vectors = self.random.standard_normal((count, _LATENT_DIM), np.float32) @ topics
        vectors += _NOISE * self.random.standard_normal((count, dim), np.float32)
        return vectors * np.float32(dim**0.5) / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _index(
        self, scan: Speed, product: Speed, pairs: Speed | None, words: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        """Milliseconds of a search that do not depend on the size, those that words add, and bytes written a second.

        The first are those of a search of a small index, by vectors alone, but for the stages with these speeds; the
        text is what is written.
        """
        vectors = self._vectors(_WRITTEN_PASSAGES, self.student.vector_dim)  # distinct: equal ones are ordered by id
        copies = range(-(-_WRITTEN_PASSAGES // len(self.passages)))
        passages = [replace(passage, id=f"{passage.id}-{copy}") for copy in copies for passage in self.passages]
        passages = passages[:_WRITTEN_PASSAGES]
        with TemporaryDirectory() as folder:
            spec = StoredSpec(student=self.student.fingerprint, dim=self.student.vector_dim)
            store = IndexStore.create(Path(folder) / "index", spec)
            begin = time.process_time()
            write_passages(store, passages, vectors)
            store.update_word_files()
            seconds = time.process_time() - begin
            store.compact(timedelta(0))  # so that texts are read from one file
            view = open_view(Storage.single(store))
            whole, with_words = (
                self._search_ms(view, vectors, terms) for terms in (dict[ScoreFeature, float](), _WORD_TERMS)
            )
            rows = [self.random.choice(len(passages), 10, replace=False) for _ in range(32)]
            texts = self._median(view.passages, rows, after_query=True)
        segment_ms, postings, candidate_words = words
        segment = WordSegment.from_texts([passage.full_text for passage in passages])
        best_ms = segment_ms + 1e3 * self._best_of([segment])[0] / postings
        scored_ms = 1e3 * _CANDIDATES * float(segment.lengths.mean()) / candidate_words
        scanned = len(passages) * store.format.code_size / scan.value
        singly = _CANDIDATES * self.student.vector_dim / product.value
        scored = 0.0 if pairs is None else _CANDIDATES / pairs.value
        counts_interaction = self.student.prepare(vectors[0], self.task).bound > 0
        stages = scanned + singly + (singly + scored if counts_interaction else 0)
        text_bytes = sum(len(passage.full_text.encode()) for passage in passages)
        words_ms = with_words - whole - best_ms - scored_ms - 1e3 * singly / 2
        return max(1e3 * texts, whole - 1e3 * stages), max(words_ms, 0.01 * best_ms), text_bytes / seconds

    def _search_ms(self, view: IndexView, vectors: NDArray[np.float32], terms: dict[ScoreFeature, float]) -> float:
        """Median milliseconds of a search that scans all vectors, and counts words if there are ``terms``."""
        sources: tuple[SourceName, ...] = ("vectors", "bm25") if terms else ("vectors",)
        settings = SearchSettings(task=self.task, score_features=terms, num_candidates=_CANDIDATES, sources=sources)
        searcher = Searcher(view, self.student, settings)
        queries = list(zip(self.queries, vectors[:, None], strict=False))
        return 1e3 * self._median(lambda one: searcher.rank([one[0]], vectors=one[1]), queries, after_query=True)


def made_up_passages(student: Student, num_passages: int = 400, words: int = 100) -> list[Passage]:
    """Passages of words of the student's vocabulary, where no others are at hand; the commonest words repeat most.

    The word of rank r has a probability in proportion to 1 / r (Zipf's law); a sentence has 20 words.
    """
    vocabulary = sorted(word for word in student.backbone.tokenizer.get_vocab() if word.isalpha() and word.isascii())
    random = np.random.default_rng(0)
    chances = 1 / np.arange(1, len(vocabulary) + 1)
    order = random.permutation(len(vocabulary))
    drawn = order[random.choice(len(vocabulary), (num_passages, words), p=chances / chances.sum())]
    return [
        Passage(f"passage-{row}", " ".join(_sentence([vocabulary[index] for index in indices])))
        for row, indices in enumerate(drawn.tolist())
    ]


def _sentence(words: Sequence[str], length: int = 20) -> list[str]:
    """The words with a full stop after every 20, and a capital after it."""
    return [
        word.capitalize() if position % length == 0 else f"{word}." if position % length == length - 1 else word
        for position, word in enumerate(words)
    ]


@contextmanager
def _one_thread() -> Generator[None]:
    """Let torch and FAISS use one thread."""
    faiss: Any = load_faiss()
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])
