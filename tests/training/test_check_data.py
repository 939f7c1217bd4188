"""Data set checks: counts, leaks, repeated texts, text statistics and memory use."""

from __future__ import annotations

import json
import random
import tracemalloc

import numpy as np
import pytest

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError
from d2llm.data.beir import beir_source
from d2llm.data.check import (
    Leak,
    Sample,
    SharedPositives,
    SplitCounts,
    guess_languages,
    measure_lengths,
    near_queries,
    read_through,
)
from d2llm.data.open_data import open_source
from d2llm.data.same_text import comparable, hash64
from d2llm.training.check_data import check_data
from e2e.command_line import write_lines
from tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_model(folder / "bert", "bert")
    return str(folder / "bert")


def write_beir(folder, passages, queries, qrels):
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [{"_id": key, "text": text} for key, text in passages.items()])
    write_lines(folder / "queries.jsonl", [{"_id": key, "text": text} for key, text in queries.items()])
    for split, judged in qrels.items():
        rows = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judged)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def write_pairs(folder, **splits):
    folder.mkdir()
    for split, rows in splits.items():
        records = [{"query": query, "document": passage, "label": label} for query, passage, label in rows]
        write_lines(folder / f"{split}.jsonl", records)
    return folder


def repeats(report):
    return {repeat.label: (repeat.count, repeat.examples) for repeat in report.repeats}


class TestRetrieval:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_beir(
            tmp_path / "pets",
            {"p1": "Cats sleep.", "p2": "cats SLEEP!", "p3": "Dogs bark.", "p4": " ", "p5": "?!", "p6": "..."},
            {
                "q1": "Who sleeps?",
                "q2": "who sleeps",
                "q3": "Who barks?",
                "q4": "Who swims?",
                "q5": "",
                "q6": "WHO: barks",
            },
            {
                "train": [("q1", "p1", 1), ("q2", "p3", 2), ("q3", "p3", 1), ("lost", "p1", 1)],
                "dev": [("q5", "p9", 1)],
                "test": [("q6", "p2", 1), ("q6", "p3", 0), ("q1", "p1", 0)],
            },
        )

    @pytest.fixture
    def report(self, folder):
        return read_through(beir_source(folder), sample_size=10).report

    def test_counts(self, report):
        assert (report.kind, report.num_queries, report.num_passages) == ("retrieval", 6, 6)
        assert report.splits == (
            SplitCounts("train", 4, 2, 4, {"1": 3, "2": 1}),
            SplitCounts("dev", 1, 1, 1, {"1": 1}),
            SplitCounts("test", 2, 3, 3, {"0": 2, "1": 1}),
        )

    def test_leaks_compare_only_letters_and_digits(self, report):
        # q1 is judged in both splits; q6 repeats the question of q3
        assert report.leaks == (Leak("same query", "train", "test", 2, (("q1", "q1"), ("q6", "q3"))),)

    def test_repeats_and_shared_positives(self, report):
        # texts without letters and digits never count as repeats
        assert repeats(report) == {
            "passages with the same text as another": (1, ("p2",)),
            "train: queries with the same text as another": (1, ("q2",)),
        }
        assert report.shared_positives == (SharedPositives("train", "test", 1, 1),)  # p2 repeats p1

    def test_issues(self, report):
        assert report.issues == (
            "train: 1 judgement of unknown queries not counted, first 1: lost",
            "dev: 1 judgement of unknown passages not counted, first 1: p9",
            "1 passage without text, first 1: p4",
            "1 query without text, first 1: q5",
            "1 query judged in no split, first 1: q4",
            "test: 1 query without a relevant passage, first 1: q1",
        )

    def test_duplicate_ids_are_rejected(self, folder):
        for name in ("queries", "corpus"):
            lines = (folder / f"{name}.jsonl").read_text().splitlines()
            (folder / f"{name}.jsonl").write_text("\n".join([*lines, lines[0]]))
            with pytest.raises(DuplicateIdError, match="was already used in line 1") as caught:
                read_through(beir_source(folder), sample_size=10)
            assert (caught.value.path, caught.value.line) == (folder / f"{name}.jsonl", 7)

    def test_memory_grows_with_ids_not_with_texts(self, tmp_path):
        def peak(num_passages):
            passages = {f"p{n}": f"passage {n} " + "long" * 500 for n in range(num_passages)}
            folder = write_beir(tmp_path / str(num_passages), passages, {"q": "who"}, {"test": [("q", "p0", 1)]})
            del passages
            tracemalloc.start()
            report = read_through(beir_source(folder), sample_size=20).report
            size = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert report.num_passages == num_passages
            return size

        per_passage = (peak(4000) - peak(1000)) / 3000
        assert per_passage < 400  # bytes for an id, its line and a hash; a text takes 2,000


class TestPairs:
    def test_counts_repeats_and_conflicts(self, tmp_path):
        rows = [
            ("a b", "c", 1),
            ("A, b!", "c", 1),
            ("c", "a b", 1),
            ("c", "a b", 1),
            ("d", "e", 0),
            ("d", "e", 1),
            ("f", "", 0),
        ]
        report = read_through(open_source(write_pairs(tmp_path / "p", train=rows)), sample_size=10).report
        assert report.splits == (SplitCounts("train", 4, 4, 7, {"0": 2, "1": 5}),)  # passages: c, a b, e, an empty one
        assert repeats(report) == {
            "train: repeated pairs": (3, ("train-2", "train-4", "train-6")),
            "train: repeated pairs in reverse order": (1, ("train-3",)),
            "pairs that another line labels differently": (1, ("train/train-6",)),
        }
        assert report.issues == ("train: 1 pair without text",)
        assert report.leaks == ()

    def test_reversed_pair_with_another_label_is_no_conflict(self, tmp_path):
        rows = [("a dog", "an animal", "entailment"), ("an animal", "a dog", "neutral")]
        report = read_through(open_source(write_pairs(tmp_path / "p", train=rows)), sample_size=10).report
        assert list(repeats(report)) == ["train: repeated pairs in reverse order"]

    def test_leaks_of_queries_and_of_pairs_in_either_order(self, tmp_path):
        folder = write_pairs(
            tmp_path / "p",
            train=[("a", "b", 1), ("c", "d", 0), ("e", "f", 1)],
            dev=[("b", "a", 1)],
            test=[("C.", "x", 1), ("e", "f", 0), ("e", "y", 0)],
        )
        report = read_through(open_source(folder), sample_size=10).report
        assert report.leaks == (
            Leak("same query", "train", "test", 2, (("test-1", "train-2"), ("test-2", "train-3"))),
            Leak("same pair", "train", "dev", 1, (("dev-1", "train-1"),)),
            Leak("same pair", "train", "test", 1, (("test-2", "train-3"),)),
        )
        assert repeats(report) == {"pairs that another line labels differently": (1, ("test/test-2",))}

    def test_score_statistics(self, tmp_path):
        records = [{"query": f"q{n}", "document": "d", "score": score} for n, score in enumerate((1.0, 4.5, 2.0))]
        write_lines(tmp_path / "test.jsonl", records)
        report = read_through(open_source(tmp_path), sample_size=10).report
        assert report.kind == "scores"
        assert report.splits == (SplitCounts("test", 3, 1, 3, {}, (1.0, 2.5, 4.5)),)


def jaccard(first, second):
    """Jaccard similarity of the sets of character trigrams of both texts."""
    sets = [{text[i : i + 3] for i in range(len(text) - 2)} for text in (first, second)]
    everything = sorted(sets[0] | sets[1])
    rows = np.array([[trigram in trigrams for trigram in everything] for trigrams in sets])
    return rows.all(axis=0).sum() / rows.any(axis=0).sum()


class TestNearQueries:
    def near(self, texts_by_split, threshold=0.8):
        pytest.importorskip("datasketch", reason="needs the package datasketch")
        ids_by_split = {
            split: {hash64(comparable(text)): key for key, text in texts.items()}
            for split, texts in texts_by_split.items()
        }
        streams = {split: (lambda texts=texts: iter(texts.items())) for split, texts in texts_by_split.items()}
        finished = []
        leaks = near_queries(streams, ids_by_split, threshold, finished.append)
        assert len(splits := [s for s in ids_by_split if ids_by_split[s]]) < 2 or sum(finished) == sum(
            len(texts_by_split[split]) for split in splits
        )
        return leaks

    def test_near_queries_are_found_whichever_split_is_larger(self):
        first = {"a": "how do i keep my old cat warm in a cold winter"}
        second = {"b": "How do I keep my old cat warm in the cold winter?"}
        fill = {f"f{n}": f"{n} something else altogether {n * n}" for n in range(3)}
        assert jaccard(comparable(first["a"]), comparable(second["b"])) > 0.8
        expected = [Leak("near query", "train", "test", 1, (("b", "a"),))]
        assert self.near({"train": first | fill, "test": second}) == expected
        assert self.near({"train": first, "test": second | fill}) == expected
        assert self.near({"train": first, "test": second}, threshold=0.95) == []

    def test_identical_queries_do_not_count_as_near(self):
        train = {
            "a": "how do i keep my old cat warm in a cold winter",
            "b": "how do i keep my old cat warm in the cold winter",
        }
        assert self.near({"train": train, "test": {"c": train["a"].upper()}}) == []

    def test_empty_splits_and_texts_without_letters_have_no_leaks(self):
        assert self.near({"train": {}, "test": {"a": "x"}}) == []
        assert self.near({"train": {"b": "?"}, "test": {"a": "!"}}) == []

    def test_near_queries_match_a_comparison_of_every_pair(self):
        rng = random.Random(0)
        words = ["river", "stone", "cloud", "garden", "window", "letter", "music", "winter", "bread", "horse"]
        texts = [" ".join(rng.choice(words) for _ in range(9)) for _ in range(60)]
        splits = {"train": {}, "dev": {}, "test": {}}
        for n, text in enumerate(texts):
            splits["train"][f"t{n}"] = text
            for split in ("dev", "test"):  # one or two words replaced
                changed = text.split()
                for position in rng.sample(range(9), rng.choice([1, 2])):
                    changed[position] = rng.choice(words)
                splits[split][f"{split}{n}"] = " ".join(changed)
        everything = {text for texts in splits.values() for text in texts.values()}
        assert len(everything) > 150
        expected = {}
        for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
            known = set(splits[first].values())
            expected[first, second] = sum(
                any(jaccard(text, other) >= 0.7 for other in known - set(splits[second].values()))
                for text in set(splits[second].values()) - known
            )
        assert sum(expected.values()) > 50
        counts = {(leak.first, leak.second): leak.count for leak in self.near(splits, threshold=0.7)}
        # no false leaks, and at most 2 % of the true ones are missed
        assert all(counts[pair] <= expected[pair] for pair in expected)
        assert sum(counts.values()) >= 0.98 * sum(expected.values())


class TestTexts:
    def test_sampling_is_uniform_over_the_stream(self):
        drawn = np.zeros(40)
        for seed in range(2000):
            sample = Sample(4, seed=seed)
            for n in range(40):
                sample.add(str(n))
            assert (sample.num_seen, len(set(sample.texts))) == (40, 4)
            drawn[[int(text) for text in sample.texts]] += 1
        # binomial with n = 2000, p = 1/10: 5 standard deviations are 67
        assert np.abs(drawn - 200).max() < 67

    def test_lengths(self):
        sample = Sample(1000)
        for length in range(1, 101):
            sample.add("x" * length)
        finished = []
        lengths = measure_lengths("queries", sample, lambda texts: [len(text) for text in texts], 80, finished.append)
        assert lengths.percentiles == {50: 50, 75: 75, 90: 90, 95: 95, 99: 99, 100: 100}
        assert lengths.fraction_over == pytest.approx(0.2)
        assert lengths.bars == tuple(
            (bound, pytest.approx(fraction))
            for bound, fraction in zip([*range(10, 90, 10), None], [0.1] * 8 + [0.2], strict=True)
        )
        assert sum(finished) == lengths.num_texts == lengths.num_all == 100
        assert measure_lengths("queries", Sample(5), len, 80, finished.append) is None

    def test_languages(self):
        pytest.importorskip("py3langid", reason="needs the package py3langid")
        texts = [
            "Where can I read more about the history of this city?",
            "What is the fastest way to learn how to swim?",
            "今天的天气非常好，我们一起去公园散步吧。",
        ]
        assert guess_languages("queries", texts).counts == {"en": 2, "zh": 1}
        assert guess_languages("queries", []) is None


class TestCheckData:
    def test_report_of_a_small_data_set(self, tmp_path, tokenizer):
        folder = write_pairs(
            tmp_path / "p",
            train=[("the cat sat on the mat and slept in the sun", "a dog runs fast", 1)],
            test=[("the cat sat on the mat and slept in the sun all", "rain falls", 0)],
        )
        report = check_data(folder, tokenizer=tokenizer)
        assert report.leaks == (Leak("near query", "train", "test", 1, (("test-1", "train-1"),)),)
        assert report.num_leaks == 1
        assert [(row.label, row.num_texts, row.limit) for row in report.lengths] == [
            ("queries", 2, 128),
            ("passages", 2, 250),
        ]
        # the tiny tokenizer makes one token of each word, and adds a special token at each end
        assert report.lengths[0].percentiles[100] >= 13
        assert [row.num_texts for row in report.languages] == [2, 2]
        assert check_data(folder, tokenizer=tokenizer, near=1).leaks == ()
        json.dumps(report.settings)

    def test_report_gives_sample_and_total_sizes(self, tmp_path, tokenizer):
        folder = write_pairs(tmp_path / "p", train=[(f"query {n}", "b", 1) for n in range(30)])
        lengths = check_data(folder, tokenizer=tokenizer, sample_size=10).lengths[0]
        assert (lengths.num_texts, lengths.num_all) == (10, 30)

    @pytest.mark.parametrize("student", ["d2llm-minilm", "d2llm-multilingual"])
    def test_limits_of_a_search_with_a_shipped_student(self, tmp_path, student):
        folder = write_pairs(tmp_path / "p", train=[("a", "b", 1)])
        report = check_data(folder, tokenizer=student)
        assert [row.limit for row in report.lengths] == [256, 256]  # of queries, training reads 64
        assert report.lengths[1].percentiles[50] in {3, 5}  # [CLS] b [SEP]; e5 has a prefix

    def test_bad_arguments_are_rejected(self, tmp_path, tokenizer):
        with pytest.raises(InputError, match=r"near is 1\.5"):
            check_data(tmp_path, tokenizer=tokenizer, near=1.5)
        with pytest.raises(InputError, match="sample_size is 0"):
            check_data(tmp_path, tokenizer=tokenizer, sample_size=0)
        with pytest.raises(DataFormatError, match="no such file or folder"):
            check_data(tmp_path / "lost", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "kind", "num_passages", "splits"),
    [
        ("stackfaq", "retrieval", 719, {"train": 779, "dev": 150, "test": 320}),
        ("pawsx-zh", "binary", None, {"train": 1473, "dev": 353, "test": 1989}),
    ],
)
def test_counts_of_real_data_sets(shared_data, name, kind, num_passages, splits):
    """Counts are from the data sets' README, which also states that no query is in two splits."""
    report = read_through(open_source(shared_data / name), sample_size=100).report
    counts = {split.name: split.num_queries if kind == "retrieval" else split.num_items for split in report.splits}
    assert (report.kind, counts) == (kind, splits)
    assert num_passages in (None, report.num_passages)
    assert [leak for leak in report.leaks if leak.kind == "same query"] == []
