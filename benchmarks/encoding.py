"""Encoding speed compared with sentence-transformers on the same backbone and the same texts.

One run on all cores (or --threads), with the rows interleaved on an otherwise idle machine; each row reports the
minimum of its repeats. Texts are real passages of several data sets, of mixed lengths, truncated to the same number of
tokens by all; every row gets texts and returns vectors, tokenizing included. Besides the speed, it measures how far the
vectors are from torch's in float32, and what fraction of the machine's limit is reached: operations for the texts
themselves, over those of the fastest products of the model's shapes in the row's number format (``scaling.roofline``).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scaling.roofline import Encoder, measure_limits

from d2llm import Student
from d2llm.core.manifest import package_versions
from d2llm.core.types import EngineName
from d2llm.data.beir import Dataset
from d2llm.data.open_data import open_data
from d2llm.models.device import cpu_has_fast_bfloat16
from d2llm.models.sources import locate_model

DATA = Path(__file__).parents[2] / "shared" / "data"
RESULT = Path(__file__).parent / "results" / "encoding.json"
ENGINES: tuple[EngineName, ...] = ("onnx", "openvino", "onnx-int8", "openvino-int8")
PEER = "sentence-transformers"
Encode = Callable[[list[str]], np.ndarray]


def read_texts(folders: list[Path], number: int) -> list[str]:
    """The same number of passages from each data set, sampled with a fixed seed."""
    texts: list[str] = []
    for folder in folders:
        dataset = open_data(folder)
        assert isinstance(dataset, Dataset)
        passages = list(dataset.passages.values())
        drawn = np.random.default_rng(0).choice(len(passages), -(-number // len(folders)), replace=False)
        texts += [f"{passages[index].title} {passages[index].text}".strip() for index in drawn]
    return texts


def rows(student_name: str) -> dict[str, Encode]:
    """Encoders by name; sentence-transformers first."""
    from sentence_transformers import SentenceTransformer

    torch_student = Student.load(student_name, device="cpu", dtype="float32")
    backbone = torch_student.config.backbone
    formats = ("float32", "bfloat16") if cpu_has_fast_bfloat16() else ("float32",)
    encoders: dict[str, Encode] = {}
    for dtype in formats:
        peer = SentenceTransformer(locate_model(backbone.model), device="cpu", model_kwargs={"dtype": dtype})
        peer.max_seq_length = backbone.max_passage_tokens
        encoders[_name(PEER, dtype)] = lambda texts, peer=peer: np.asarray(peer.encode(texts, show_progress_bar=False))
    students = {"torch": torch_student}
    for engine in ENGINES:
        students[engine] = Student.load(student_name, engine=engine, dtype="float32")
    for dtype in formats[1:]:
        students[_name("torch", dtype)] = Student.load(student_name, device="cpu", dtype=dtype)
        for engine in ("openvino", "openvino-int8"):
            students[_name(engine, dtype)] = Student.load(student_name, engine=engine, dtype=dtype)
    for name, student in students.items():
        encoders[name] = lambda texts, student=student: student.encode_passages(texts).vectors
    return encoders


def _name(encoder: str, dtype: str) -> str:
    return encoder if dtype == "float32" else f"{encoder} {dtype}"


def measure(encoders: dict[str, Encode], texts: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Texts per second of each row, its speed relative to the float32 peer, and its difference from torch's vectors."""
    seconds: dict[str, float] = dict.fromkeys(encoders, float("inf"))
    vectors: dict[str, np.ndarray] = {}
    for encode in encoders.values():
        encode(texts[:8])
    for _ in range(repeats):
        for name, encode in encoders.items():
            begin = time.perf_counter()
            vectors[name] = encode(texts)
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    first, exact = seconds[PEER], vectors["torch"]
    measured: dict[str, dict[str, float]] = {}
    for name in encoders:
        measured[name] = {"texts_per_second": len(texts) / seconds[name], "ratio": first / seconds[name]}
        if not name.startswith(PEER):  # the peer has its own pooling, without PMA
            norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(vectors[name], axis=1)
            measured[name] |= {
                "largest_difference": float(abs(vectors[name] - exact).max()),
                "least_cosine": float(((exact * vectors[name]).sum(1) / norms).min()),
            }
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="d2llm-minilm")
    parser.add_argument("--data", type=Path, nargs="*", default=[DATA / n for n in ("wikiqa", "nfcorpus", "stackfaq")])
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = read_texts(arguments.data, arguments.texts)
    encoders = rows(arguments.student)
    student = Student.load(arguments.student)
    lengths = student.tokenize(texts, "passage").lengths
    encoder = Encoder.shape_of(student.backbone.model)
    formats = ["float32", "int8", *(["bfloat16"] if cpu_has_fast_bfloat16() else [])]
    limits = measure_limits(encoder, formats)
    rows_measured = measure(encoders, texts, arguments.repeats)
    limits = {name: max(value, limits[name]) for name, value in measure_limits(encoder, formats).items()}
    operations = encoder.forward((1, length) for length in lengths) / len(texts) / 1e9
    print("limits, GFLOP/s:", ", ".join(f"{name} {value:,.0f}" for name, value in limits.items()))
    for name, row in rows_measured.items():
        number_format = next((other for other in ("int8", "bfloat16") if other in name), "float32")
        row["gflop_per_second"] = operations * row["texts_per_second"]
        row["fraction_of_limit"] = row["gflop_per_second"] / limits[number_format]
        print(
            f"{name:24} {row['texts_per_second']:8.1f} texts/s  x{row['ratio']:.2f}  "
            f"{row['fraction_of_limit']:4.0%} of the limit  {row.get('least_cosine', '')}"
        )
    result = {
        "student": arguments.student,
        "data": [folder.name for folder in arguments.data],
        "texts": len(texts),
        "tokens": {"mean": float(np.mean(lengths)), "longest": max(lengths)},
        "threads": arguments.threads,
        "bfloat16_products": cpu_has_fast_bfloat16(),
        "packages": package_versions(),
        "limits": limits,
        "rows": rows_measured,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
