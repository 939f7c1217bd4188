"""The verb ``export``: writes a student as files that other programs can run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from d2llm.cli.options import JsonOption, StudentArgument
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@verb("Tools")
def export(
    context: typer.Context,
    student: StudentArgument,
    to: Annotated[
        Literal[
            "onnx", "openvino", "numpy", "student", "sentence-transformers", "multi-vector-encoder", "pylate", "vespa"
        ],
        typer.Option(
            help="onnx, openvino: graphs from tokens to a vector and from vectors to scores; numpy: the head alone, as "
            "arrays and one Python file; student: a student's folder, for use with --depth, or of a model of "
            "sentence-transformers, untrained; sentence-transformers: one "
            "that this library alone can load; multi-vector-encoder, pylate: its token embeddings, for this library or "
            "PyLate; vespa: an application of Vespa."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the files go.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Eight-bit products in the encoder: smaller, faster, less exact.")
    ] = False,
    depth: Annotated[
        int | None,
        typer.Option(
            metavar="LAYERS",
            help="Only the first layers of the backbone, for a student trained with nested_cross_entropy.layers.",
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Write a student as files for programs without d2llm.

    The files are float32, whatever this machine computes with; with --int8 the encoder uses eight-bit products.
    """
    from d2llm.core.errors import InputError
    from d2llm.models.export.export import export, report_of
    from d2llm.models.student import Student
    from d2llm.models.student_files import read_student_manifest
    from d2llm.models.untrained import is_bi_encoder, write_untrained

    session = session_of(context)
    if to == "student" and is_bi_encoder(student):
        if int8 or depth is not None:
            raise InputError(
                "a model of sentence-transformers becomes a student as it is; leave --int8 and --depth out"
            )
        manifest, _ = read_student_manifest(write_untrained(student, out))
        report = report_of(out, to, "float32", manifest["fingerprint"])
    else:
        loaded = Student.load(student, device="cpu", dtype="float32")
        report = export(loaded if depth is None else loaded.cut(depth), out, to, int8=int8)
    session.say(f"export: {', '.join(report.files)} in {out}, {report.num_bytes:,} bytes, {report.precision}")
    session.write_report(context, json_path, report)
