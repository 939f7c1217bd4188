"""The verb ``distill-static``: makes a backbone that looks its vectors up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.index_options import (
    CorpusArgument,
    FileOptions,
    warn_of_links,
    warn_of_skipped,
)
from d2llm.cli.options import DeviceOption, DtypeOption, JsonOption, in_existing_folder
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb


@verb("Distil")
def distill_static(
    context: typer.Context,
    corpus: CorpusArgument,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="Where the model goes; a new folder.")
    ],
    files: FileOptions,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A model as in student.backbone.model of a recipe.")
    ] = "minilm",
    dim: Annotated[int | None, typer.Option(min=1, help="Principal components to keep.", show_default="all")] = None,
    smoothing: Annotated[float, typer.Option(help="The larger it is, the more frequent tokens count.")] = 1e-3,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json_path: JsonOption = None,
) -> None:
    """Make a backbone that looks up one vector for each token.

    MODEL reads every token of its vocabulary alone, and how often each occurs in CORPUS decides its weight. In a
    recipe, set student.backbone.model to FOLDER and tuning to full (or frozen): the student encodes many times as
    fast, and is less accurate. The folder is also a model for model2vec and sentence-transformers.
    """
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.models.backbone import Backbone
    from d2llm.recipe import BackboneConfig
    from d2llm.training.distill_static import distill_static

    session = session_of(context)
    texts = open_corpus(corpus, **files.reading)
    backbone = Backbone.load(BackboneConfig(model=model), device=device, dtype=dtype)
    passages = (passage.full_text for passage in texts.passages)
    report = distill_static(backbone, passages, out, dim=dim, smoothing=smoothing)
    report = replace(report, skipped=tuple(texts.skipped))
    session.say(
        f"distill-static: {report.num_vectors:,} vectors of {report.dim} numbers ({report.variance:.0%} of the "
        f"variance), weighted by {report.num_tokens:,} tokens of {report.num_passages:,} passages; in {out}"
    )
    warn_of_skipped(session, report.skipped)
    warn_of_links(session, texts.links)
    session.write_report(context, json_path, report)
