import io

from rich.console import Console

from d2llm.apps.tables import evaluation_table, sample_table
from d2llm.pipeline.report import EvaluationReport, EvaluationRow, MissingRow, Significance


def make_report(sample_rows=()):
    rows = (
        EvaluationRow("BM25", {"nDCG@10": 0.5, "MRR@10": 0.25}, 1.25, None, 1200),
        EvaluationRow("D2LLM", {"nDCG@10": 0.61234, "MRR@10": 0.3}, 1234.5, 768, 1200),
    )
    test = Significance("nDCG@10", "D2LLM", "BM25", 0.11234, 0.0123, 1200, 10_000)
    missing = (MissingRow("teacher", "no teacher was given"),)
    return EvaluationReport(
        "zoo", "test", "asymmetric", 5000, 1200, 3, rows, missing, sample_rows, test, {}, ("2 odd things",)
    )


def rendered(table):
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def test_table_shows_every_figure():
    lines = rendered(evaluation_table(make_report())).splitlines()
    assert "zoo / test: 1,200 queries, 5,000 passages" in lines[0]
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]] for line in lines if "│" in line
    }
    assert cells["BM25"] == ["0.5000", "0.2500", "1.2", "-", "1,200"]
    assert cells["D2LLM"] == ["0.6123", "0.3000", "1,234.5", "768", "1,200"]
    assert cells["teacher: not measured, no teacher was given"] == ["-"] * 5
    caption = " ".join(lines)
    assert "3 queries without a relevant passage in the corpus were left out" in caption
    assert "D2LLM against BM25: nDCG@10 +0.1123, p = 0.0123" in caption
    assert "2 odd things" in caption


def test_sample_table_only_where_there_is_a_sample():
    assert sample_table(make_report()) is None
    table = sample_table(make_report((EvaluationRow("BM25", {"nDCG@10": 0.7}, 1, None, 50),)))
    text = rendered(table)
    assert "the 50 queries that the teacher judged" in " ".join(text.split())  # a narrow table wraps its title
    assert "0.7000" in text
