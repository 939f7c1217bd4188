"""Mining filters: dropping likely positives, the order of candidates, and the audit."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2llm.core.errors import InputError, ModelError, RecipeError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.data.same_text import jaccard, shingles
from d2llm.models.teachers.pair_teacher import TeacherScores, load_teacher
from d2llm.recipe import MiningConfig
from d2llm.recipe.data import RankWeighted, Sampling, Top
from d2llm.recipe.recipe import named_teacher, parse_recipe
from d2llm.training.mining.audit import MarginHistogram, audit_page, rank_range
from d2llm.training.mining.choose import order_candidates, random_of
from d2llm.training.mining.mine import MiningResult, mine
from d2llm.training.mining.ranking import encode_to_file, put_vectors
from d2llm.training.mining.teacher import TeacherCheck, TeacherWorkers
from fake_models import FakeStudent, Interruption
from list_endpoint import counts_words, judged_lists, list_teacher
from local_endpoint import Reply

# BM25 for "cat" ranks shorter passages first: a, b, c, ...
TEXTS = {name: " ".join(["cat", *(f"{name * 3}{word}" for word in range(n))]) for n, name in enumerate("abcdefgh", 1)}


def world(grades: dict[str, int], texts: dict[str, str] | None = None, **splits: dict[str, dict[str, int]]) -> Dataset:
    passages = {name: Passage(name, text) for name, text in (texts or TEXTS).items()}
    qrels = {"train": {"q": grades}, "dev": {}, "test": {}, **splits}
    return Dataset("tiny", Path("/somewhere/else/tiny"), passages, {"q": Query("q", "cat")}, qrels)


def mined(dataset: Dataset, teacher: TeacherCheck | None = None, student: Any = None, **settings: Any) -> MiningResult:
    config = MiningConfig.model_validate({"num_hard": 8, "num_easy": 0, "sampling": "top", **settings})
    return mine(dataset, "train", config, encoder=None, student=student, teacher=teacher, seed=0)


def hard(result: MiningResult) -> tuple[str, ...]:
    return result.entries[0].hard_negatives


@dataclass
class Teacher:
    """Looks log-odds up by the first letter after "cat"; the features are 1 and the log-odds."""

    log_odds: dict[str, float]
    fingerprint: str = "t"
    asked: list[list[str]] = field(default_factory=list)

    def prompt_fingerprint(self, task: str) -> str:
        return "p"

    def score_pairs(self, pairs: Any, task: str, *, with_features: bool = False, advance: Any = None) -> TeacherScores:
        assert with_features
        names = [text.split()[1][0] for _, text in pairs]
        self.asked.append(names)
        values = np.array([self.log_odds[name] for name in names], np.float32)
        features = np.array([[1.0, self.log_odds[name]] for name in names], np.float32)
        return TeacherScores(values, features, 0, 0)


def check(folder: Path, dataset: Dataset, teacher: Teacher | None, margin: float) -> TeacherCheck:
    store = LabelStore(folder, teacher="t", prompt="p", dataset="tiny")
    workers = None if teacher is None else TeacherWorkers.here(teacher)
    return TeacherCheck(store, workers, "asymmetric", margin, dataset.passages)


LISTS = {"bm25": list("abcde"), "cosine": list("edxyz")}
ODDS = {"a": 3.0, "b": 2.5, "c": -4.0, "d": 1.0, "e": 0.9, "f": -1.0, "g": -2.0, "h": -3.0}
POSITIVE = "cat the quick brown fox jumps over the lazy dog near the river bank today"


class TestOrder:
    def test_top_takes_the_better_rank_then_the_id(self):
        candidates = order_candidates(LISTS, {"a"}, 0, Top(), random.Random(0))
        # Ranks without the positive: bm25 b0 c1 d2 e3, cosine e0 d1 x2 y3 z4.
        assert [c.passage_id for c in candidates] == ["b", "e", "c", "d", "x", "y", "z"]
        assert candidates[1].ranks == {"bm25": 3, "cosine": 0}
        assert (candidates[1].best_rank, candidates[1].sources) == (0, "bm25+cosine")

    def test_the_top_of_each_list_is_skipped_in_both(self):
        candidates = order_candidates(LISTS, {"a"}, 1, Top(), random.Random(0))
        assert [c.passage_id for c in candidates] == ["c", "d", "x", "y", "z"]  # skips b of bm25, and e of cosine

    @pytest.mark.parametrize("sampling", ["uniform", "rank_weighted"])
    def test_draws_follow_the_seed_and_include_every_candidate(self, sampling):
        first, again, other = (
            order_candidates(LISTS, (), 0, Sampling(kind=sampling), random_of(seed)) for seed in (1, 1, 2)
        )
        assert first == again != other
        assert sorted(c.passage_id for c in first) == list("abcdexyz")

    def test_rank_weighted_draws_in_proportion_to_one_over_rank(self):
        lists = {"bm25": ["a", "b", "c"]}
        firsts = Counter(
            order_candidates(lists, (), 0, RankWeighted(), random_of(seed))[0].passage_id for seed in range(4000)
        )
        # weights 1, 1/2, 1/3: shares 6/11, 3/11, 2/11; the standard deviation of a share is below 0.008
        for name, fraction in (("a", 6 / 11), ("b", 3 / 11), ("c", 2 / 11)):
            assert firsts[name] / 4000 == pytest.approx(fraction, abs=0.03)

    def test_another_sampling_is_one_class(self):
        """It has settings of its own, and is used by its name in a recipe, in Python and when mining again."""

        class FromLetter(Sampling, kind="from_letter"):
            letter: str = "a"

            def order(self, pool, rng):
                del rng
                return sorted(pool, key=lambda each: (each.passage_id < self.letter, each.passage_id))

        try:
            assert hard(mined(world({"a": 1}), sampling="from_letter", num_hard=3)) == ("b", "c", "d")
            chosen = {"kind": "from_letter", "letter": "f"}
            assert hard(mined(world({"a": 1}), sampling=chosen, num_hard=4)) == ("f", "g", "h", "b")
            recipe = parse_recipe({"mining": {"sampling": {"kind": "from_letter", "letter": "g"}}})
            assert recipe.mining.sampling == FromLetter(letter="g")
            assert parse_recipe(recipe.model_dump(mode="json")) == recipe
            with pytest.raises(RecipeError, match=r"mining\.sampling\.letter"):
                parse_recipe({"mining": {"sampling": {"kind": "from_letter", "letter": 3}}})
        finally:
            del Sampling.kinds._classes["from_letter"]

    def test_a_larger_num_hard_keeps_the_first_choices(self):
        fewer, more = (hard(mined(world({"a": 1}), sampling="uniform", num_hard=n)) for n in (2, 5))
        assert more[:2] == fewer


class TestRanges:
    def test_ranks_before_range_min_are_skipped(self):
        mining = mined(world({"a": 1}), range_min=2, range_max=5)
        assert hard(mining) == ("d", "e")  # of a to e: a is the positive, b and c are skipped

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"range_min": 50}, "range_min is 50, but must be below range_max, which is 50"),
            ({"range_min": -1}, "mining.range_min is -1, but must be at least 0"),
            ({"sources": []}, "sources is empty"),
            ({"sampling": "best"}, "mining.sampling"),
        ],
    )
    def test_invalid_settings_are_rejected(self, values, message):
        with pytest.raises(Exception, match=message):
            parse_recipe({"mining": values})

    def test_mining_without_any_list_is_rejected(self):
        with pytest.raises(InputError, match="there is no list to mine from"):
            mined(world({"a": 1}), sources=["encoder"])


class TestNearDuplicates:
    def test_likeness_compares_trigrams(self):
        # "abcd" has abc and bcd, "abce" has abc and bce: 1 of 3 shared. Case and punctuation are ignored.
        assert jaccard(shingles("abcd"), shingles("ABCE!")) == pytest.approx(1 / 3)
        assert jaccard(shingles("ab"), shingles("ab")) == 1
        assert jaccard(shingles(""), shingles("...")) == 0

    def test_near_duplicates_of_positives_are_dropped_and_counted(self):
        texts = TEXTS | {"p": POSITIVE, "n": POSITIVE + "s"}
        result = mined(world({"p": 1}, texts), num_hard=9)
        assert set(hard(result)) == set(TEXTS)
        assert result.report["num_dropped"] == {"near_duplicate": 1, "relative_margin": 0, "teacher_margin": 0}
        [drop] = result.audit["dropped"]["near_duplicate"]["first"]
        assert (drop["query_id"], drop["passage_id"], drop["limit"]) == ("q", "n", 0.9)
        expected = jaccard(shingles(POSITIVE), shingles(POSITIVE + "s"))
        assert drop["value"] == pytest.approx(expected, abs=1e-4)
        assert "n" in hard(mined(world({"p": 1}, texts), num_hard=9, near_duplicate=1))

    def test_passages_judged_not_relevant_are_kept(self):
        texts = TEXTS | {"p": POSITIVE, "n": POSITIVE + "s"}
        assert "n" in hard(mined(world({"p": 1, "n": 0}, texts), num_hard=9))
        # ... but not those that another split judges relevant
        assert "n" not in hard(mined(world({"p": 1, "n": 0}, texts, more={"q": {"n": 1}}), num_hard=9))


class TestRelativeMargin:
    @dataclass
    class Student:
        """Scores a passage by its first letter after "cat", as an inner product with (1, 0)."""

        scores: dict[str, float]
        fingerprint: str = "s"
        has_dot: bool = True
        config: Any = None

        def _encode(self, texts: Any, advance: Any) -> Any:
            @dataclass
            class Encoded:
                vectors: Any
                num_truncated: int = 0
                num_tokens: int = 0

            names = [text.split()[1][0] if " " in text else "" for text in texts]
            return Encoded(np.array([[self.scores.get(name, 1.0), 1.0] for name in names], np.float32))

        def encode_passages(self, texts: Any, *, advance: Any = None) -> Any:
            return self._encode(texts, advance)

        encode_queries = encode_passages

        def query_vectors(self, vectors: Any, task: str) -> Any:
            return np.array([[1.0, 0.0]] * len(vectors), np.float32)

        def score(self, query: Any, passages: Any, task: str) -> Any:
            return passages[:, 0]

    def test_scores_near_the_positives_are_dropped(self):
        student = self.Student({"a": 0.8, "b": 0.6, "c": 0.69, "d": 0.66, "e": 0.67, "f": 0.1, "g": 0.9, "h": 0.0})
        result = mined(world({"a": 1, "b": 1}), student=student, relative_margin=0.05)
        # The positives' mean is 0.7; scores above 0.665 are dropped: c, e, g.
        assert set(hard(result)) == {"d", "f", "h"}
        assert result.report["num_dropped"]["relative_margin"] == 3
        # Margins: dropped -0.2, 0.01 and 0.03, kept 0.04, 0.6 and 0.7; edges -8 -4 -2 -1 0 1 ...
        histogram = result.audit["margins"]["student"]
        assert histogram["dropped"] == [0, 0, 0, 0, 1, 2, 0, 0, 0, 0]
        assert histogram["kept"] == [0, 0, 0, 0, 0, 3, 0, 0, 0, 0]

    def test_a_negative_mean_lowers_the_limit_too(self):
        student = self.Student({"a": -1.0, "b": -1.02, "c": -1.2, **dict.fromkeys("defgh", -9.0)})
        result = mined(world({"a": 1}), student=student, relative_margin=0.1)
        assert "b" not in hard(result)  # -1.02 > -1.1
        assert "c" in hard(result)

    def test_relative_margin_needs_an_encoder(self):
        with pytest.raises(InputError, match="needs an encoder's scores"):
            mined(world({"a": 1}), relative_margin=0.05)


class TestTeacherMargin:
    def test_candidates_as_relevant_as_the_positives_are_dropped(self, tmp_path):
        dataset = world({"a": 1})
        teacher = Teacher(ODDS)
        result = mined(dataset, check(tmp_path, dataset, teacher, 2.0), num_hard=2)
        assert hard(result) == ("c", "d")  # b 2.5 > 3 - 2; d 1.0 is not above 1
        assert teacher.asked == [["a", "b", "c"], ["d"]]  # no more than needed, the positive once
        assert result.report["num_dropped"]["teacher_margin"] == 1
        assert result.report["teacher"] == {"scored": 4, "truncated": 0, "without_label": 0}
        histogram = result.audit["margins"]["teacher"]
        # kept 3 - -4 = 7 and 3 - 1 = 2, dropped 0.5; edges -8 -4 -2 -1 0 1 2 4 8
        assert histogram["kept"] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
        assert histogram["dropped"] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]

    def test_the_mean_of_several_positives_counts(self, tmp_path):
        dataset = world({"a": 1, "c": 1})  # mean (3 - 4) / 2 = -0.5
        result = mined(dataset, check(tmp_path, dataset, Teacher(ODDS), 1.0))
        assert set(hard(result)) == {"g", "h"}  # at or below -1.5; f at -1 is above

    def test_judgements_are_stored_with_their_gram_and_reused(self, tmp_path):
        dataset, teacher = world({"a": 1}), Teacher(ODDS)
        first = mined(dataset, check(tmp_path, dataset, teacher, 2.0), num_hard=2)
        store = LabelStore(tmp_path, teacher="t", prompt="p", dataset="tiny")
        assert store.log_odds("q") == {"a": 3.0, "b": 2.5, "c": -4.0, "d": 1.0}
        ids, gram = store.gram("q")
        assert ids == ("a", "c", "d")
        # cosine of (1, 3) and (1, -4)
        assert gram[0, 1] == pytest.approx((1 - 12) / np.sqrt(10 * 17), abs=1e-6)
        assert store.missing_cosines("q", first.entries[0].positives + hard(first)) == []
        num_calls = len(teacher.asked)
        second = mined(dataset, check(tmp_path, dataset, teacher, 2.0), num_hard=2)
        assert second.entries == first.entries
        assert len(teacher.asked) == num_calls

    def test_stored_labels_are_enough_without_a_judge(self, tmp_path):
        dataset = world({"a": 1})
        store = LabelStore(tmp_path, teacher="t", prompt="p", dataset="tiny")
        store.write([QueryLabels("q", ("a", "b", "c"), np.array([3, 2.5, -4], np.float32))])
        result = mined(dataset, check(tmp_path, dataset, None, 2.0), num_hard=3)
        assert hard(result) == ("c", "d", "e")
        assert result.report["teacher"] == {"scored": 0, "truncated": 0, "without_label": 2}

    def test_a_human_no_outweighs_the_teachers_yes(self, tmp_path):
        dataset = world({"a": 1, "b": 0})
        assert hard(mined(dataset, check(tmp_path, dataset, Teacher(ODDS), 2.0), num_hard=1)) == ("b",)

    def test_labels_of_a_graded_teacher_keep_their_grades_and_what_came_before_an_error(self, tmp_path):
        dataset = world({"a": 1}, {"a": "cat sleeps", "b": "cat runs", "c": "dog", "d": "cat and mouse"})
        with list_teacher(tmp_path, "graded") as (file, endpoint):
            model = load_teacher(named_teacher(str(file)))
            teacher = check(tmp_path / "labels", dataset, model, 1.0)
            mined(dataset, teacher, teacher_margin=1.0, num_hard=1)
            assert teacher.labels.read_again().grades("q") == {"a": 20, "b": 20, "d": 20}  # in two rounds
            last = len(endpoint.requests)

            def until_the_key_expires(request, number):
                return counts_words(request, number) if number == last else Reply({"error": "expired"}, status=403)

            endpoint.reply = until_the_key_expires
            teacher = check(tmp_path / "others", dataset, model, 1.0)
            with pytest.raises(ModelError, match="expired"):
                mined(dataset, teacher, teacher_margin=1.0, num_hard=1)
        assert len(teacher.labels.read_again().grades("q")) == 2

    def test_a_teacher_that_ranks_sees_the_positives_with_every_candidate(self, tmp_path):
        texts = {"a": "cat sleeps", "b": "cat", "c": "dog", "d": "cat and mouse", "e": "cat cat cat"}
        dataset = replace(world({"a": 1}, texts), queries={"q": Query("q", "cat mouse")})
        with list_teacher(tmp_path, "listwise") as (file, endpoint):
            model = load_teacher(named_teacher(str(file)))
            teacher = check(tmp_path / "labels", dataset, model, 0.5)
            result = mined(dataset, teacher, teacher_margin=0.5, num_hard=1)
            lists = [judged_lists(request)[1] for request in endpoint.requests[1:]]
        assert all("cat sleeps" in texts and len(texts) > 1 for texts in lists)
        assert len(lists) > 1
        assert hard(result)
        assert len(teacher.labels.read_again()) == 0  # label judges the list of the plan as a whole

    def test_a_margin_without_a_teacher_is_rejected(self):
        with pytest.raises(InputError, match="no teacher was given"):
            mined(world({"a": 1}), teacher_margin=1.0)


class TestStudentRanking:
    def test_candidates_are_ranked_by_the_full_score(self):
        student = FakeStudent()
        result = mined(world({"a": 1}), student=student, sources=["encoder"], num_hard=7)
        names = [name for name in TEXTS if name != "a"]
        vectors = student.encode_passages([TEXTS[name] for name in names]).vectors
        scores = student.score(student.encode_queries(["cat"]).vectors[0], vectors, "asymmetric")
        assert list(hard(result)) == [names[row] for row in np.argsort(-scores)]
        assert result.report["hard_negatives_from"] == {"student": 7}

    def test_a_head_without_an_inner_product_scores_every_passage(self):
        student = FakeStudent(head="paper")
        assert len(hard(mined(world({"a": 1}), student=student, sources=["encoder"]))) == 7

    def test_interrupted_encoding_resumes(self, tmp_path, monkeypatch):
        monkeypatch.setattr("d2llm.training.mining.ranking.BLOCK_PASSAGES", 3)
        passages = world({}).passages
        ids = sorted(passages)
        with pytest.raises(Interruption):
            encode_to_file(FakeStudent(fail_after=6), passages, ids, tmp_path)
        student = FakeStudent(fail_after=2)
        vectors = encode_to_file(student, passages, ids, tmp_path)
        assert student.encoded_passages == 2
        whole = FakeStudent()
        np.testing.assert_array_equal(vectors, whole.encode_passages([TEXTS[name] for name in ids]).vectors)
        # once finished, nothing is encoded again; another student or text gets its own file
        encode_to_file(FakeStudent(fail_after=0), passages, ids, tmp_path)
        for other, texts in (
            (FakeStudent(fingerprint="other"), passages),
            (whole, passages | {"a": Passage("a", "x")}),
        ):
            before = other.encoded_passages
            encode_to_file(other, texts, ids, tmp_path)
            assert other.encoded_passages == before + 8

    def test_vectors_of_an_index_are_not_made_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr("d2llm.training.mining.ranking.BLOCK_PASSAGES", 3)
        student, dataset = FakeStudent(), world({"a": 1})
        stored = student.encode_passages([TEXTS[name] for name in sorted(TEXTS)]).vectors
        passages, ids = dataset.passages, sorted(dataset.passages)
        put_vectors(
            student, passages, ids, tmp_path / "work", lambda block: stored[[ids.index(name) for name in block]]
        )
        num_encoded = student.encoded_passages
        config = MiningConfig(num_hard=7, num_easy=0, sampling="top", sources=["encoder"])
        found = mine(dataset, "train", config, encoder=None, student=student, seed=0, work=tmp_path / "work")
        assert student.encoded_passages == num_encoded
        assert hard(found) == hard(mined(dataset, student=student, sources=["encoder"], num_hard=7))


class TestAudit:
    def test_ranks_are_counted_in_ranges(self):
        assert [rank_range(rank) for rank in (0, 4, 5, 19, 20, 100, 5000)] == [
            "1-5",
            "1-5",
            "6-10",
            "11-20",
            "21-50",
            "101-",
            "101-",
        ]
        result = mined(world({"a": 1}))
        assert result.audit["kept_by_rank"]["bm25"] == {
            "1-5": 5,
            "6-10": 2,
            "11-20": 0,
            "21-50": 0,
            "51-100": 0,
            "101-": 0,
        }
        assert result.audit["candidates"] == {"in_range": 7, "tried": 7}

    def test_a_margin_on_an_edge_counts_above_it(self):
        histogram = MarginHistogram((0.0, 1.0))
        for margin in (-0.5, 0.0, 0.99, 1.0, 7.0):
            histogram.add(margin, kept=True)
        assert histogram.to_json() == {"edges": [0.0, 1.0], "kept": [1, 2, 2], "dropped": [0, 0, 0]}

    def test_the_page_renders_and_reveals_no_path(self, tmp_path):
        from markdown_it import MarkdownIt

        texts = TEXTS | {"p": POSITIVE, "n": POSITIVE + "s", "w": "cat | <b>*odd*</b> `x`\n# text " + "long " * 200}
        dataset = world({"p": 1}, texts)
        result = mined(dataset, num_hard=9)
        page = audit_page(result.report, result.audit)
        assert "somewhere" not in page + json.dumps(result.audit)
        html = MarkdownIt().enable("table").render(page)
        assert html.count("<table>") == 3
        assert html.count("<h3>") == 1
        assert "<b>" not in html
        assert "cat | &lt;b&gt;*odd*&lt;/b&gt; `x` # text long" in html
        assert "dropped (near_duplicate" in html
        assert f"<strong>positive</strong> <code>p</code>: {POSITIVE}" in html
        assert len(max(page.splitlines(), key=len)) < 500

    def test_examples_are_a_seeded_sample(self):
        dataset = world({"a": 1})
        queries = {f"q{n}": Query(f"q{n}", "cat") for n in range(30)}
        dataset = Dataset("tiny", dataset.path, dataset.passages, queries, {"train": {q: {"a": 1} for q in queries}})
        query_ids = [e["query_id"] for e in mined(dataset).audit["examples"]]
        assert len(query_ids) == 20
        assert query_ids == [e["query_id"] for e in mined(dataset).audit["examples"]]
        assert set(query_ids) != set(list(queries)[:20])
