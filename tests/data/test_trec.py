import gzip

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2llm.core.errors import DataFormatError, DuplicateIdError, InputError
from d2llm.data.trec import read_run, write_run
from examples import examples

RUN = """\
q1 Q0 d2 1 9.5 bm25
q1 Q0 d9 2 3 bm25
q1\tQ0\td10\t3\t3.0\tbm25

q2 Q0 d1 1 -1e-3 bm25
"""


def write_text(folder, text, name="run.txt"):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["run.txt", "run.trec.gz"])
def test_reads_scores_and_orders_ties_as_trec_eval_does(tmp_path, name):
    run = read_run(write_text(tmp_path, RUN, name))
    assert run.name == "bm25"
    assert run.rankings == {"q1": ("d2", "d9", "d10"), "q2": ("d1",)}
    assert run.scores == {"q1": {"d2": 9.5, "d9": 3.0, "d10": 3.0}, "q2": {"d1": -0.001}}
    assert run.issues == ()


def test_scores_override_ranks_and_conflicts_are_counted(tmp_path):
    run = read_run(write_text(tmp_path, "q1 Q0 a 1 1 x\nq1 Q0 b 2 2 x\nq2 Q0 a 7 2 x\nq2 Q0 b 9 1 x\n"))
    assert run.rankings["q1"] == ("b", "a")
    assert run.issues == ("the ranks of 1 of 2 queries do not follow the scores; the scores are used (first: q1)",)


def test_order_of_lines_does_not_matter(tmp_path):
    run = read_run(write_text(tmp_path, "q1 Q0 b 2 1 x\nq1 Q0 a 1 2 x\n"))
    assert run.rankings["q1"] == ("a", "b")
    assert run.issues == ()


def test_different_tags_are_counted(tmp_path):
    run = read_run(write_text(tmp_path, "q1 Q0 a 1 2 x\nq1 Q0 b 2 1 y\n", "mine.v2.run.gz"))
    assert run.name == "mine.v2"
    assert run.issues == ("2 different tags (x, y); read as one run",)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("q1 Q0 d3 4 1.0", "expected 6 columns .* found 5"),
        ("q1 Q0 d3 4 1.0 my run", "found 7"),
        ("q1 Q0 d3 4 high x", "score must be a number, found 'high'"),
        ("q1 Q0 d3 4 nan x", "the score is nan, which cannot be ranked"),
        ("q1 Q0 d3 4 nan x", "score is nan"),
        ("q1 Q0 d3 4 -inf x", "score is -inf"),
        ("q1 Q0 d3 4.5 1.0 x", "rank must be a whole number, found '4.5'"),
        ("q1 Q0 d2 4 1.0 x", "'d2' is ranked twice for query 'q1'"),
    ],
)
def test_a_bad_line_is_reported_with_its_number(tmp_path, line, problem):
    path = write_text(tmp_path, RUN + line + "\n")
    with pytest.raises(DataFormatError, match=rf"run\.txt:6: .*{problem}") as caught:
        read_run(path)
    assert isinstance(caught.value, DuplicateIdError) == ("twice" in problem)


def test_files_that_are_not_runs_are_rejected(tmp_path):
    with pytest.raises(DataFormatError, match="no such file"):
        read_run(tmp_path / "none.txt")
    with pytest.raises(DataFormatError, match="holds no ranking"):
        read_run(write_text(tmp_path, "\n\n"))
    (tmp_path / "latin.txt").write_bytes("q1 Q0 caf\u00e9 1 1 x\n".encode("latin-1"))
    with pytest.raises(DataFormatError, match=r"latin\.txt:1: not valid UTF-8"):
        read_run(tmp_path / "latin.txt")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(RUN.encode())[:-10])
    with pytest.raises(DataFormatError, match="damaged or truncated gzip"):
        read_run(tmp_path / "cut.gz")


def test_writes_what_trec_eval_reads(tmp_path):
    write_run(tmp_path / "run.txt", "ours", {"q1": [("b", 0.5), ("a", 0.1 + 0.2)]})
    assert (tmp_path / "run.txt").read_text() == f"q1 Q0 b 1 0.5 ours\nq1 Q0 a 2 {0.1 + 0.2!r} ours\n"


def test_values_the_format_cannot_hold_are_rejected(tmp_path):
    path = tmp_path / "run.txt"
    for name, query_id, passage_id in (("my run", "q", "p"), ("ours", "q 1", "p"), ("ours", "q", ""), ("", "q", "p")):
        with pytest.raises(InputError, match="contains white space"):
            write_run(path, name, {query_id: [(passage_id, 1.0)]})
    with pytest.raises(InputError, match="query 'q', passage 'p': the score nan"):
        write_run(path, "ours", {"q": [("p", float("nan"))]})
    assert not path.exists()


word = st.text(st.characters(blacklist_categories=("Z", "C")), min_size=1, max_size=4)


@settings(max_examples=examples(60))
@given(
    scored=st.dictionaries(
        word, st.dictionaries(word, st.sampled_from([-1.0, 0.1, 0.1 + 1e-12, 7.0]), min_size=1), min_size=1, max_size=4
    ),
    suffix=st.sampled_from([".txt", ".gz"]),
)
def test_written_runs_keep_their_order_here_and_in_trec_eval(tmp_path_factory, scored, suffix):
    path = tmp_path_factory.mktemp("runs") / f"run{suffix}"
    ordered = {
        query_id: sorted(passages.items(), key=lambda item: (-item[1], item[0]))
        for query_id, passages in scored.items()
    }
    write_run(path, "ours", ordered)
    run = read_run(path)
    assert run.rankings == {query_id: tuple(name for name, _ in passages) for query_id, passages in ordered.items()}
    assert run.issues == ()
    qrels = {query_id: {passages[-1][0]: 1} for query_id, passages in ordered.items()}
    for measured in ir_measures.iter_calc([ir_measures.RR], qrels, run.scores):
        assert measured.value == pytest.approx(1 / len(ordered[measured.query_id]))
    for query_id, passages in scored.items():
        assert run.scores[query_id] == pytest.approx(passages, abs=1e-5)
