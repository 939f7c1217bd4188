"""Tuning a reader of vectors on a tiny random model: its lists, that it learns and resumes, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2llm.core.errors import InputError, TrainingDivergedError
from d2llm.core.types import Passage, Query
from d2llm.data.beir import Dataset
from d2llm.data.labels import LabelStore, QueryLabels
from d2llm.models.backbone import Backbone
from d2llm.models.listwise_reader import ListwiseReader
from d2llm.models.student import Student
from d2llm.ops.losses import drawing_divergence, drawing_loss
from d2llm.recipe import BackboneConfig, Lora, LoraConfig, ReaderTuningConfig
from d2llm.retrieval.index import Index
from d2llm.training import tune_reader as module
from d2llm.training import tune_reader as verb
from d2llm.training.pretrain import word_head
from d2llm.training.tune_reader import (
    RankedLists,
    ReadList,
    collect_lists,
    dev_queries,
    measure,
    ndcg,
    train_queries,
    training_lists,
    tune_reader,
)
from tiny_models import TEXTS, tiny_student_config, write_tiny_model, write_trained_student

EVERY_STEP = 1e-9  # minutes between checkpoints
DEPTH = 6


def questions(name="tiny", *, num_train=12, num_dev=4, shared=()):
    """A train query is the first words of its passage; dev queries have all others, and the first one ``shared``."""
    count = num_train + num_dev
    words = [text.split() for text in TEXTS]
    texts = {f"p{n:02}": " ".join(words[n % 8][n % 3 :] + words[(n + n // 8) % 8]) for n in range(count)}
    queries = {f"q{n:02}": Query(f"q{n:02}", " ".join(texts[f"p{n:02}"].split()[:3])) for n in range(count)}
    qrels = {
        "train": {f"q{n:02}": {f"p{n:02}": 1} for n in range(num_train)},
        "dev": {f"q{n:02}": {f"p{m:02}": 1 for m in range(num_train, count)} for n in range(num_train, count)},
    }
    for number in shared:
        qrels["dev"][f"q{num_train:02}"][f"p{number:02}"] = 1
    return Dataset(name, Path(name), {key: Passage(key, text) for key, text in texts.items()}, queries, qrels)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def student(root):
    return Student.load(write_trained_student(root), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llama(root):
    return write_tiny_model(root / "llama", seed=3)


def config_of(llama, **settings):
    values = {
        "model": str(llama),
        "layers": 1,
        "lora": LoraConfig(rank=2, alpha=4.0, dropout=0.1),
        "depth": DEPTH,
        "steps": 4,
        "lists": (12, 12),
        "batch_lists": 4,
        "checkpoint_minutes": EVERY_STEP,
    }
    return ReaderTuningConfig.model_validate(values | settings)


def tune(student, llama, folder, *datasets, seed=0, **settings):
    return tune_reader(
        student,
        datasets or [questions()],
        folder,
        config=config_of(llama, **settings),
        seed=seed,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture(scope="module")
def tuned(student, llama, root):
    return tune(student, llama, root / "reader")


def random_lists(number, *, seed=0, dim=8, marked=True):
    """Lists whose relevant passage, at a random place, has a large first coordinate, whatever the query is."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(number, DEPTH, dim)).astype(np.float32)
    grades = np.zeros((number, DEPTH), np.int64)
    grades[np.arange(number), rng.integers(DEPTH, size=number)] = 1
    if marked:
        vectors[..., 0] = np.where(grades, 6, -1)
    ids = [[f"{row}-{index}" for index in range(DEPTH)] for row in range(number)]
    scores = np.tile(-np.arange(DEPTH, dtype=np.float64), (number, 1))
    return RankedLists([str(row) for row in range(number)], ["the cat"] * number, ids, vectors, scores, grades)


def test_the_report_and_the_reader(tuned, student, llama, root):
    assert 0 < tuned.num_lists["tiny"] <= 12
    assert (tuned.steps, tuned.num_shared, len(tuned.losses)) == (6, 0, 2)
    figures = tuned.dev["tiny"]
    assert figures.num_queries == 4
    assert all(0 < getattr(figures, name) < 1 for name in ("student", "first_step", "decoded", "random"))
    manifest = json.loads((root / "reader" / "manifest.json").read_text())
    assert manifest["report"]["dev"]["tiny"]["decoded"] == figures.decoded
    assert (manifest["fingerprint"], manifest["student"]) == (tuned.fingerprint, student.fingerprint)
    assert manifest["data"] == ["tiny"]
    assert not list((root / "reader.run").rglob("checkpoint.safetensors"))
    reader = ListwiseReader.load(root / "reader", device="cpu", dtype="float32")
    chosen = {"dev": [f"q{n}" for n in range(12, 16)]}
    arguments = {"task": "asymmetric", "config": config_of(llama), "folder": root / "again"}
    lists = collect_lists(student, questions(), chosen, **arguments)
    assert measure(reader, lists["dev"], questions().qrels["dev"]).decoded == pytest.approx(figures.decoded)


def test_the_lists_are_the_students_rankings(student, llama, tmp_path, monkeypatch):
    data, config = questions(), config_of(llama)
    chosen = {"train": ["q03", "q07"], "dev": ["q13"]}
    arguments = {"task": "asymmetric", "config": config, "folder": tmp_path}
    lists = collect_lists(student, data, chosen, **arguments)
    index = Index.create(tmp_path / "index", student)
    index.upsert(data.passages.values())
    for split, query_ids in chosen.items():
        own = lists[split]
        assert (own.query_ids, len(own)) == (query_ids, len(query_ids))
        rankings = index.search([data.queries[each] for each in query_ids], top_k=DEPTH)
        assert own.ids == [[one.passage.id for one in ranking.passages] for ranking in rankings]
        assert own.scores.tolist() == [[one.score for one in ranking.passages] for ranking in rankings]
        assert own.vectors.shape == (len(query_ids), DEPTH, student.vector_dim)
        np.testing.assert_array_equal(own.vectors[0], index.view.vectors(index.view.rows(own.ids[0])))
        relevant = [data.qrels[split][query_id] for query_id in query_ids]
        expected = [[each.get(one, 0) for one in ids] for each, ids in zip(relevant, own.ids, strict=True)]
        assert own.grades.tolist() == expected
    monkeypatch.setattr(verb.Index, "create", None)  # they are read from the file
    again = collect_lists(student, data, chosen, **arguments)
    np.testing.assert_array_equal(again["train"].vectors, lists["train"].vectors)
    assert again["dev"].ids == lists["dev"].ids
    with pytest.raises(TypeError):
        collect_lists(student, data, chosen | {"dev": ["q14"]}, **arguments)


def test_queries_that_share_a_passage_with_dev_are_left_out():
    kept, num_shared = train_queries(questions(shared=(2, 5)), ReaderTuningConfig())
    assert num_shared == 2
    assert sorted(kept) == [f"q{n:02}" for n in range(12) if n not in (2, 5)]
    assert train_queries(questions(shared=(2, 5)), ReaderTuningConfig(max_queries=3))[0] == kept[-3:]
    all_of_them, num_shared = train_queries(questions(shared=(2, 5)), ReaderTuningConfig(exclude_shared_passages=False))
    assert (len(all_of_them), num_shared) == (12, 0)
    assert len(dev_queries(questions(), 2, 0)) == 2
    assert dev_queries(Dataset("t", Path("t"), {}, {}, {"train": {}}), 2, 0) == []


def test_the_order_to_learn_has_relevant_passages_first_wherever_they_are_read():
    lists = random_lists(1)
    lists.grades[:] = [[0, 0, 1, 0, 2, 0]]
    assert ReadList(lists, 0, [*range(DEPTH)]).target == [4, 2, 0, 1, 3, 5]
    mixed = ReadList(lists, 0, [5, 4, 3, 2, 1, 0])
    assert [mixed.order[index] for index in mixed.target] == [4, 2, 0, 1, 3, 5]
    np.testing.assert_array_equal(mixed.vectors, lists.vectors[0, ::-1])


def test_training_lists_have_something_to_learn_and_half_of_them_are_mixed():
    lists = random_lists(5)
    lists.grades[0] = 0
    read = training_lists([lists], 8, 0)
    assert [sorted(each.row for each in part) for part in (read[:4], read[4:])] == [[1, 2, 3, 4]] * 2
    assert [each.order == [*range(DEPTH)] for each in read] == [False, True] * 4
    lists.grades[:] = 0
    with pytest.raises(InputError, match="finds no relevant passage"):
        training_lists([lists], 8, 0)


def test_ndcg_counts_relevant_passages_outside_of_the_list():
    lists = random_lists(1)
    relevant = lists.ids[0][int(lists.grades[0].argmax())]
    order = sorted(range(DEPTH), key=lambda index: lists.ids[0][index] != relevant)
    assert ndcg(lists, [order], {"0": {relevant: 1}}).tolist() == [1.0]
    assert ndcg(lists, [order], {"0": {relevant: 1, "elsewhere": 1}}).tolist() == [
        pytest.approx(1 / (1 + 1 / np.log2(3)))
    ]


def test_a_reader_learns_what_a_vector_says(llama, tmp_path):
    config = config_of(llama, lists=(320, 160), batch_lists=8, network_rate=1e-2, checkpoint_minutes=60)
    backbone = Backbone.load(
        BackboneConfig(model=str(llama), layers=1, tuning=Lora(**config.lora.model_dump())),
        device="cpu",
        dtype="float32",
    )
    reader = ListwiseReader(backbone, 8, "a-student", steps=4)
    stages = module.train_reader(reader, [random_lists(64)], config, tmp_path / "run", {}, seed=0)
    first, last = stages[0].mean_losses
    assert last < first - 0.2
    lists = random_lists(20, seed=1)
    qrels = {
        key: dict(zip(ids, own, strict=True))
        for key, ids, own in zip(lists.query_ids, lists.ids, lists.grades.tolist(), strict=True)
    }
    figures = measure(reader.eval(), lists, qrels)
    assert figures.decoded > 0.95
    assert figures.random < 0.8


def test_the_teachers_order_replaces_the_judgements(student, llama, tmp_path):
    data = questions()
    said = {"q03": {f"p{n:02}": float(n % 5) for n in range(DEPTH + 2)}, "q05": {"p01": 1.0}}
    store = LabelStore(tmp_path / "labels", teacher="T", prompt="P", dataset="tiny")
    store.write([QueryLabels(key, tuple(own), np.array([*own.values()], np.float32)) for key, own in said.items()])
    config = config_of(llama, labels=str(tmp_path / "labels"))
    assert train_queries(data, config) == (["q03"], 0)  # of q05 there are too few
    arguments = {"task": "asymmetric", "config": config, "folder": tmp_path}
    chosen = {"train": ["q03"], "dev": ["q13"]}
    lists = collect_lists(student, data, chosen, **arguments)
    own, ids = lists["train"], lists["train"].ids[0]
    vectors = student.encode_passages([data.passages[key].full_text for key in said["q03"]]).vectors
    (query,) = student.encode_queries([data.queries["q03"].text]).vectors
    by_student = dict(zip(said["q03"], student.score(query, vectors, "asymmetric").tolist(), strict=True))
    assert ids == sorted(said["q03"], key=lambda key: -by_student[key])[:DEPTH]
    target = [ids[index] for index in ReadList(own, 0, [*range(DEPTH)]).target]
    assert target == sorted(ids, key=lambda key: (-said["q03"][key], ids.index(key)))
    plain = collect_lists(student, data, chosen, **arguments | {"config": config_of(llama)})
    assert lists["dev"].ids == plain["dev"].ids
    labels = str(tmp_path / "labels")
    with pytest.raises(InputError, match=r"only 1 train query with a relevant passage and 6 labelled ones in tiny"):
        tune(student, llama, tmp_path / "reader", labels=labels)
    assert tune(student, llama, tmp_path / "reader", labels=labels, batch_lists=1).num_lists == {"tiny": 1}


def test_with_texts_the_model_learns_from_both_and_to_rank_vectors_alike(student, llama, tmp_path):
    data, config = questions(), config_of(llama)
    lists = collect_lists(student, data, {"train": ["q03"]}, task="asymmetric", config=config, folder=tmp_path)
    read = ReadList(module.with_texts(lists["train"], data), 0, [5, 4, 3, 2, 1, 0])
    assert read.texts == [data.passages[key].full_text for key in reversed(read.lists.ids[0])]
    backbone = Backbone.load(BackboneConfig(model=str(llama), layers=1), device="cpu", dtype="float32")
    reader = ListwiseReader(backbone, student.vector_dim, "s", steps=4).eval()
    orders, alone = torch.tensor([read.target[:4]]), ([read.query], read.vectors[None], [read.target[:4]])
    with torch.no_grad():
        logits, by_texts = reader.step_logits(*alone), reader.step_logits(*alone, [read.texts])
        assert float(module.loss_of(reader, [ReadList(lists["train"], *read[1:])])) == drawing_loss(logits, orders)
        expected = drawing_loss(logits, orders) + drawing_loss(by_texts, orders)
        expected += 0.2 * drawing_divergence(logits, by_texts, orders)
        assert float(module.loss_of(reader, [read])) == pytest.approx(float(expected), rel=1e-6)
    plain, with_texts = (tune(student, llama, tmp_path / f"{texts}", texts=texts) for texts in (False, True))
    assert plain.fingerprint != with_texts.fingerprint


def test_alignment_teaches_the_network_alone_to_repeat_texts(student, llama, root, tmp_path):
    tuned = tune(student, llama, tmp_path / "aligned", alignment=16, lists=(4, 0), network_rate=1e-2)
    assert (tuned.steps, len(tuned.losses)) == (5, 2)
    backbone = Backbone.load(BackboneConfig(model=str(llama), layers=1), device="cpu", dtype="float32")
    reader, head = ListwiseReader(backbone, student.vector_dim, "s", steps=4), word_head(backbone)
    texts = [passage.full_text for passage in questions().passages.values()]
    vectors = student.encode_passages(texts).vectors
    before = {name: value.clone() for name, value in reader.state_dict().items()}
    first = float(reader.repetition_loss(texts, vectors, head))
    config = config_of(llama, alignment=16, lists=(4, 0), network_rate=1e-2, batch_lists=2)
    repeated = [module.Repeated(text, vector) for text, vector in zip(texts, vectors, strict=True)] * 8
    module.train_reader(
        reader, [random_lists(4, dim=student.vector_dim)], config, tmp_path, {}, seed=0, repeated=repeated
    )
    assert float(reader.repetition_loss(texts, vectors, head)) < first - 0.3
    changed = {name for name, value in reader.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("projection", "log_scale")) for name in changed)


@pytest.mark.parametrize("stop", [2, 3, 5])  # in the first stage, between both, in the second
def test_an_interrupted_run_continues_to_the_same_weights(tuned, student, llama, root, tmp_path, monkeypatch, stop):
    loss_of, num_calls = module.loss_of, 0

    def interrupted(*arguments):
        nonlocal num_calls
        num_calls += 1
        if num_calls > stop:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    monkeypatch.setattr(module, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(student, llama, tmp_path / "reader")
    assert not (tmp_path / "reader").exists()
    monkeypatch.setattr(module, "loss_of", loss_of)
    torch.manual_seed(random.randrange(1_000))  # the seed of the process must not matter
    report = tune(student, llama, tmp_path / "reader")
    assert report.fingerprint == tuned.fingerprint
    assert report.losses == tuned.losses
    first, second = (load_file(folder / "reader.safetensors") for folder in (root / "reader", tmp_path / "reader"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for stage in ("network", "lora"):
        lines = (tmp_path / "reader.run" / stage / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_without_lora_and_without_dev_queries(student, llama, tmp_path):
    data = questions()
    data = Dataset(data.name, data.path, data.passages, data.queries, {"train": data.qrels["train"]})
    report = tune(student, llama, tmp_path / "reader", data, lists=(4, 0))
    assert (report.steps, len(report.losses), report.dev) == (1, 1, {})
    names = load_file(tmp_path / "reader" / "reader.safetensors").keys()
    assert not any("lora" in name for name in names)
    assert (
        len(
            ListwiseReader.load(tmp_path / "reader", device="cpu").rank(
                ["a"], [np.ones((2, student.vector_dim), np.float32)]
            )
        )
        == 1
    )


def test_a_student_without_an_inner_product(llama, root, tmp_path):
    config = tiny_student_config(root / "backbone")
    config = config.model_copy(update={"interaction": config.interaction.model_copy(update={"head": "paper"})})
    paper = Student.create(config, device="cpu", dtype="float32")
    assert not paper.has_dot
    report = tune(paper, llama, tmp_path / "reader", lists=(4, 4))
    assert report.dev["tiny"].num_queries == 4


def test_what_cannot_be_tuned_is_refused(student, llama, tmp_path):
    out = tmp_path / "reader"
    with pytest.raises(InputError, match=r"only 3 train queries .* in tiny, but a step takes 4; 0 others"):
        tune(student, llama, out, questions(num_train=3))
    with pytest.raises(InputError, match=r"no data"):
        tune_reader(student, [], out)
    with pytest.raises(InputError, match="16 passages, but a list takes 20; lower the depth"):
        tune(student, llama, out, depth=20)
    with pytest.raises(InputError, match="same name"):
        tune(student, llama, out, questions(), questions())
    with pytest.raises(InputError, match="layers is 9"):
        tune(student, llama, out, layers=9)
    with pytest.raises(TrainingDivergedError):
        tune(student, llama, out, network_rate=1e30)
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(InputError, match="did not make"):
        tune(student, llama, other)


def test_a_finished_reader_is_not_replaced(tuned, student, llama, root):
    with pytest.raises(InputError, match="already holds a finished reader"):
        tune(student, llama, root / "reader")
