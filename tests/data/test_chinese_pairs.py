"""Reading pair files in the layouts of the published Chinese data sets."""

from __future__ import annotations

import json

import pytest

from d2llm.core.errors import DataFormatError
from d2llm.data.chinese_pairs import split_of
from d2llm.data.pairs import read_pairs


def rows(pairs, split):
    """(query, passage, label or score) of each pair."""
    return [(p.query, p.passage, p.label if p.score is None else p.score) for p in pairs.splits[split]]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.50k.json", "train"),
        ("LCQMC.valid.data", "dev"),
        ("atec_nlp_sim_train_add.csv", "train"),
        ("translated_train.tsv", "train"),
        ("dev_2k.tsv", "dev"),
        ("test_2k.tsv", "test"),
        ("cnsd-sts-test.txt", "test"),
        ("validation-00000-of-00001.parquet", "dev"),
        ("trained.json", None),
        ("labels.json", None),
    ],
)
def test_file_names_determine_the_split(name, split):
    assert split_of(name) == split


def test_ocnli(tmp_path):
    def line(number, label):
        votes = {"label0": label, "label1": None, "genre": "news", "prem_id": "n_1", "id": number}
        return json.dumps({"level": "easy", "sentence1": "他在家", "sentence2": f"句{number}", "label": label} | votes)

    (tmp_path / "train.50k.json").write_text("\n".join([line(1, "neutral"), line(2, "-"), line(3, "entailment")]))
    (tmp_path / "train.3k.json").write_text(line(1, "neutral"))
    (tmp_path / "dev.json").write_text(line(0, "contradiction") + "\n" + line(4, "neutral"))
    unlabelled = {"sentence1": "他在家", "sentence2": "他不在", "id": 0}
    (tmp_path / "test.json").write_text(json.dumps(unlabelled) + "\n")
    pairs = read_pairs(tmp_path)
    assert (pairs.kind, pairs.classes) == ("classes", ("contradiction", "entailment", "neutral"))
    assert rows(pairs, "train") == [("他在家", "句1", "neutral"), ("他在家", "句3", "entailment")]
    assert [pair.id for pair in pairs.splits["dev"]] == ["0", "4"]
    assert pairs.issues == (
        "files that were not read: train.3k.json",
        "train: 1 pair without an agreed label, left out",
        "test: 1 pair without an agreed label, left out",
        "dev: contradiction: no such class in train",
    )


def test_cmnli_and_afqmc(tmp_path):
    (tmp_path / "train.json").write_text(
        '{"sentence1": "双十一花呗提额在哪", "sentence2": "里可以提花呗额度", "label": "0"}\n'
        '{"sentence1": "a", "sentence2": "b", "label": "1"}\n'
    )
    pairs = read_pairs(tmp_path)
    assert pairs.kind == "binary"
    assert pairs.positives("train") == [False, True]


@pytest.mark.parametrize("header", ["", "text_a\ttext_b\tlabel\n", "sentence1\tsentence2\tlabel\n"])
@pytest.mark.parametrize("name", ["train.tsv", "LCQMC.train.data"])
def test_lcqmc_and_bq(tmp_path, header, name):
    (tmp_path / name).write_text(header + '他说"好\t他说好\t1\n我手机丢了，我想换个手机\t我想买个新手机\t0\n')
    pairs = read_pairs(tmp_path)
    assert rows(pairs, "train") == [('他说"好', "他说好", "1"), ("我手机丢了，我想换个手机", "我想买个新手机", "0")]
    assert pairs.kind == "binary"
    assert pairs.splits["train"][0].id == ("train-2" if header else "train-1")


def test_bq_with_commas_and_quotes(tmp_path):
    (tmp_path / "train.csv").write_text('sentence1,sentence2,label\n"一天,内还款","第一行\n第二行",1\nx,y,0\n')
    pairs = read_pairs(tmp_path)
    assert rows(pairs, "train") == [("一天,内还款", "第一行\n第二行", "1"), ("x", "y", "0")]
    (tmp_path / "train.csv").write_text('sentence1,sentence2,label\nx,"y"z,0\n')
    with pytest.raises(DataFormatError, match="not valid comma-separated text") as caught:
        read_pairs(tmp_path)
    assert caught.value.line == 2


def test_two_atec_files_are_numbered_as_one_split(tmp_path):
    (tmp_path / "atec_nlp_sim_train.csv").write_bytes("\ufeff1\t怎么更改花呗\t如何改花呗\t1\n2\t甲\t乙\t0\n".encode())
    (tmp_path / "atec_nlp_sim_train_add.csv").write_text("1\t丙\t丁\t0\n")
    pairs = read_pairs(tmp_path)
    assert rows(pairs, "train") == [("怎么更改花呗", "如何改花呗", "1"), ("甲", "乙", "0"), ("丙", "丁", "0")]
    assert [pair.id for pair in pairs.splits["train"]] == ["train-1", "train-2", "train-3"]


def test_pawsx(tmp_path):
    header = "id\tsentence1\tsentence2\tlabel\n"
    (tmp_path / "translated_train.tsv").write_text(header + "1\t甲\t乙\t0\n2\t丙\t丁\t1\n")
    (tmp_path / "dev_2k.tsv").write_text(header + "1\t甲\t戊\t1\n2\t甲\t己\t\n")
    (tmp_path / "test_2k.tsv").write_text(header + "9\t甲\t庚\t1\n")
    pairs = read_pairs(tmp_path)
    assert {split: [pair.id for pair in members] for split, members in pairs.splits.items()} == {
        "train": ["1", "2"],
        "dev": ["1"],
        "test": ["9"],
    }
    assert pairs.issues == ("dev: 1 pair without an agreed label, left out",)


def test_stsb(tmp_path):
    (tmp_path / "cnsd-sts-train.txt").write_text("main-1||一架飞机||一架正在起飞的飞机||5\nmain-2||甲||乙||3\n")
    pairs = read_pairs(tmp_path)
    assert pairs.kind == "scores"
    assert rows(pairs, "train") == [("一架飞机", "一架正在起飞的飞机", 5.0), ("甲", "乙", 3.0)]


@pytest.mark.parametrize("header", ["", "index\tsentence1\tsentence2\tscore\n"])
def test_stsb_with_tabs(tmp_path, header):
    number = "0\t" if header else ""
    (tmp_path / "STS-B.train.data").write_text(f"{header}{number}甲\t乙\t3\n{number}丙\t丁\t1\n")
    assert rows(read_pairs(tmp_path), "train") == [("甲", "乙", 3.0), ("丙", "丁", 1.0)]


def test_layout_decides_whether_zeros_and_ones_are_scores(tmp_path):
    (tmp_path / "train.tsv").write_text("甲\t乙\t1\n丙\t丁\t0\n")
    assert read_pairs(tmp_path).kind == "binary"
    assert read_pairs(tmp_path, layout="stsb").kind == "scores"


def test_files_with_two_columns_have_no_labels(tmp_path):
    (tmp_path / "train.tsv").write_text("甲\t乙\t1\n")
    (tmp_path / "test.tsv").write_text("甲\t丙\n丙\t丁\n")
    assert read_pairs(tmp_path).issues == ("test: 2 pairs without an agreed label, left out",)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("甲\t乙\t1\n\n甲\t乙\n", 3, "expected 3 columns (sentence1, sentence2, label), found 2"),
        ("甲\t乙\t1\n甲\t乙\t丙\t1\n", 2, "expected 3 columns"),
        ("a\tb\tc\td\t1\n", 1, "5 columns (between tabs, || or commas) and no header"),
        ("q1\tq2\tlabel\n甲\t乙\t1\n", 1, "the header (q1, q2, label) does not name the two texts"),
        ("first text\tsecond text\tis same\n甲\t乙\t1\n", 1, "the header (first text, second text, is same) does not"),
        ("anchor\tother\trelation\n甲\t乙\tsame\n", 1, "the header (anchor, other, relation) does not name the two"),
        ("sentence1\tsentence2\tscore\n甲\t乙\tnan\n", 2, "field 'score' must be a finite number, found 'nan'"),
    ],
)
def test_malformed_tables_are_reported_with_their_line(tmp_path, content, line, problem):
    path = tmp_path / "train.tsv"
    path.write_text(content)
    with pytest.raises(DataFormatError) as caught:
        read_pairs(tmp_path)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert problem in str(caught.value)
