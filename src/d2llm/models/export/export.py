"""The command ``export``: write a student, or its head, as files that other programs can run."""

from __future__ import annotations

import errno
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from d2llm.core.errors import InputError
from d2llm.core.extras import require_openvino
from d2llm.core.files import folder_bytes, new_folder
from d2llm.core.inputs import check_choice, path_of, shown
from d2llm.core.manifest import write_manifest
from d2llm.core.types import TASKS, Task
from d2llm.models.export import numpy_head
from d2llm.models.export.graphs import Runtime, write_score_graph, write_text_graph
from d2llm.models.export.sentence_transformers import why_no_transformer, why_not_plain, write_multi_vector
from d2llm.models.export.vespa import write_vespa
from d2llm.models.interaction import CosineHead, Interaction
from d2llm.models.student import Student
from d2llm.models.tokens import NO_TOKENS, search_query_tokens

KIND = "export"
FORMAT_VERSION = 1
ExportFormat = Literal[
    "onnx", "openvino", "numpy", "student", "sentence-transformers", "multi-vector-encoder", "pylate", "vespa"
]
_FOLDERS_OF_STUDENTS = ("student", "sentence-transformers")
_FOLDERS_OF_TOKENS = ("multi-vector-encoder", "pylate")


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written: the names of the files, and their total size in bytes."""

    folder: Path
    format: ExportFormat
    precision: str
    student_fingerprint: str
    files: tuple[str, ...]
    num_bytes: int


def export(student: Student, folder: str | Path, to: ExportFormat, *, int8: bool = False) -> ExportReport:
    """Write a student for programs without d2llm into ``folder``, atomically.

    The calibration of its scores, if any, is written too (``probabilities.json``), except beside token embeddings.

    Args:
        student: the student to write, in float32 on the CPU.
        folder: where to write; an existing export is replaced.
        to: ``onnx`` and ``openvino`` write the tokenizer and the graphs (``models.export.graphs``) that encode texts
            and score vectors in each task; ``numpy`` writes only the head, as arrays and one Python file that needs
            only numpy; ``student`` writes a student's folder, such as of one that was cut (``Student.cut``);
            ``sentence-transformers`` writes it with all weights, so that the library alone loads it too: its vectors
            and inner product, but neither an interaction nor what an index adds to the score;
            ``multi-vector-encoder`` writes its token embeddings as that library's ``MultiVectorEncoder``, ``pylate``
            as a model of PyLate; ``vespa`` writes an application package (``models.export.vespa``).
        int8: use 8-bit products in the graph that encodes texts (only ``onnx`` and ``openvino``).

    Raises:
        InputError: ``folder`` holds something else, there is no such format, it has no 8-bit form, the student is not
            in float32, sentence-transformers has no modules for it, it has no token embeddings, or (Vespa) no inner
            product.
        ModelError: the backbone cannot be written as a graph.
        MissingExtraError: a package that writes the format is not installed.

    Example:
        >>> from d2llm import Student, export
        >>> student = Student.load("d2llm-minilm", device="cpu", dtype="float32")
        >>> export(student, "head", "numpy").files
        ('head.npz', 'numpy_head.py', 'probabilities.json')
    """
    check_choice(to, "to", get_args(ExportFormat))
    if not isinstance(cast("object", student), Student):
        raise InputError(f"student is {shown(student)}, but must be a Student; load it with Student.load")
    if int8 and to in ("numpy", "vespa", *_FOLDERS_OF_STUDENTS, *_FOLDERS_OF_TOKENS):
        raise InputError(f"the {to} {'head' if to == 'numpy' else 'folder'} is in float32; leave int8 out")
    precision, folder = "int8" if int8 else "float32", path_of(folder, "folder")
    if to in _FOLDERS_OF_STUDENTS:
        if to == "sentence-transformers" and (reason := why_not_plain(student.config)) is not None:
            raise InputError(
                f"sentence-transformers alone cannot load this student: {reason}; export --to onnx instead, or save "
                "d2llm.integrations.sentence_transformers.as_sentence_transformer(student), which needs d2llm to load"
            )
        student.save(folder, merge=True if to == "sentence-transformers" else None)
        return report_of(folder, to, precision, student.fingerprint)
    with new_folder(folder, kind=KIND) as temporary:
        if to == "numpy":
            _write_numpy(student, temporary)
        elif to in _FOLDERS_OF_TOKENS:
            _write_tokens(student, temporary, pylate=to == "pylate")
        elif to == "vespa":
            write_vespa(student, temporary)
        else:
            _write_graphs(student, temporary, to, int8=int8)
        if student.calibration and to not in ("vespa", *_FOLDERS_OF_TOKENS):
            student.calibration.write(temporary, student.fingerprint)
        names = report_of(temporary, to, precision, student.fingerprint).files
        write_manifest(temporary, KIND, FORMAT_VERSION, _content(student, to, precision, names))
    return ExportReport(folder, to, precision, student.fingerprint, names, folder_bytes(folder))


def report_of(folder: Path, to: ExportFormat, precision: str, fingerprint: str) -> ExportReport:
    """What is in a folder that was written, of the student with this fingerprint."""
    names = tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
    return ExportReport(folder, to, precision, fingerprint, names, folder_bytes(folder))


def _content(student: Student, to: ExportFormat, precision: str, names: tuple[str, ...]) -> dict[str, Any]:
    """What another program must know to use the files."""
    head, backbone = student.interaction, student.backbone.config
    content: dict[str, Any] = {
        "format": to,
        "precision": precision,
        "student": student.fingerprint,
        "dim": student.vector_dim,
        "head": head.kind if isinstance(head, CosineHead) else head.config.head,
        "files": names,
    }
    if to in ("numpy", "vespa", *_FOLDERS_OF_TOKENS):
        return content
    keys = ("max_passage_tokens", "query_prefix", "passage_prefix")
    writers = {package: version(package) for package in (("onnx", "onnxruntime") if precision == "int8" else ("onnx",))}
    limits = {"max_query_tokens": search_query_tokens(backbone)} | {key: getattr(backbone, key) for key in keys}
    return content | limits | {"writers": writers}


def _write_graphs(student: Student, folder: Path, to: Runtime, *, int8: bool) -> None:
    openvino: Any = require_openvino("writing OpenVINO's format") if to == "openvino" else None
    write_text_graph(
        student.backbone, student.pooling, student.interaction, folder / "text.onnx", int8_for=to if int8 else None
    )
    for task in TASKS:
        write_score_graph(student.interaction, task, folder / f"score_{task}.onnx")
    student.backbone.tokenizer.save_pretrained(folder)
    if openvino is None:
        return
    for file in sorted(folder.glob("*.onnx")):
        # Keep the weights as they are: by default they would be converted to float16.
        try:
            openvino.save_model(
                openvino.Core().read_model(str(file)), str(file.with_suffix(".xml")), compress_to_fp16=False
            )
        except RuntimeError as error:  # it does not tell of what was lacking: disk, or files
            raise OSError(errno.EIO, "OpenVINO cannot write it") from error
        file.unlink()


def _write_tokens(student: Student, folder: Path, *, pylate: bool) -> None:
    if student.token_projection is None:
        raise InputError(NO_TOKENS)
    if (reason := why_no_transformer(student.config)) is not None:
        raise InputError(f"sentence-transformers cannot read texts as this student does: {reason}")
    write_multi_vector(folder, student.backbone, student.token_projection, pylate=pylate)


def _write_numpy(student: Student, folder: Path) -> None:
    with (folder / numpy_head.FILE_NAME).open("wb") as file:
        # Uncompressed: the arrays hardly compress, and are read three times as fast this way.
        np.savez(file, allow_pickle=False, **head_arrays(student.interaction))
    (folder / "numpy_head.py").write_text(inspect.getsource(numpy_head), encoding="utf-8")


def head_arrays(head: Interaction | CosineHead) -> dict[str, np.ndarray]:
    """The head's float32 arrays: those that both tasks share as ``name``, the others as ``task/name``."""
    with torch.inference_mode():
        arrays_by_task = {task: _task_arrays(head, task) for task in TASKS}
    first, second = (arrays_by_task[task] for task in TASKS)
    weights: dict[str, np.ndarray] = {}
    for name in {**first, **second}:
        of_tasks = [arrays[name] for arrays in (first, second) if name in arrays]
        if np.array_equal(of_tasks[0], of_tasks[-1]):  # also if only one task has an interaction
            weights[name] = of_tasks[0]
        else:
            weights |= {f"{task}/{name}": arrays_by_task[task][name] for task in TASKS}
    return weights


def _task_arrays(head: Interaction | CosineHead, task: Task) -> dict[str, np.ndarray]:
    if isinstance(head, CosineHead):
        if head.kind == "divergence":
            raise InputError("this file maps queries by a matrix, and the head divergence has none; export another way")
        return {"dot": _array(head.log_scale.exp() / head.dim)}
    if not head.has_interaction(task):
        unit = torch.eye(head.dim, device=next(head.parameters()).device)
        bound = {"bound": head.bound(task)} if head.config.tasks else {}
        return {name: _array(part) for name, part in {"dot": head.query_vectors(unit, task), **bound}.items()}
    layers = head.split_layers(task)
    tensors: dict[str, Tensor | None] = {
        "query": layers.query,
        "passage": layers.passage,
        "product": layers.product,
        "difference": layers.difference,
        "first_bias": layers.bias,
        "last": layers.last,
        "constant": layers.constant,
    }
    for index, layer in enumerate(layers.inner):
        tensors |= {f"inner_{index}_weight": layer.weight, f"inner_{index}_bias": layer.bias}
    if head.has_dot:
        # query_vectors is linear, so its values for the unit vectors are its matrix.
        tensors["dot"] = head.query_vectors(torch.eye(head.dim, device=layers.last.device), task)
        tensors["bound"] = head.bound(task)
    for name, gate in (("query_gate", head.query_gate), ("passage_gate", head.passage_gate)):
        if gate is not None:
            tensors |= {f"{name}_weight": gate.weight[0], f"{name}_bias": gate.bias[0]}
    return {name: _array(tensor) for name, tensor in tensors.items() if tensor is not None}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().contiguous().numpy().copy()
