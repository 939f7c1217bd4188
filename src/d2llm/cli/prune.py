"""The verbs ``prune-vocabulary`` and ``prune-neurons``: a smaller student, by what a corpus needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2llm.cli.index_options import CorpusArgument, FileOptions, warn_of_links, warn_of_skipped
from d2llm.cli.options import JsonOption, StudentArgument, in_existing_folder, input_path
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb

_OutOption = Annotated[
    Path, typer.Option(metavar="FOLDER", callback=in_existing_folder, help="Where the smaller student goes.")
]


@verb("Distil")
def prune_vocabulary(
    context: typer.Context,
    student: StudentArgument,
    corpus: CorpusArgument,
    out: _OutOption,
    files: FileOptions,
    check: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CORPUS", callback=input_path, help="Texts of which to count what is lost, such as queries. Repeat."
        ),
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Leave out the tokens that a corpus does not have.

    Most weights of a multilingual student are embeddings of tokens of other languages. Vectors of texts with the
    tokens of CORPUS stay the same. Other words are cut into smaller pieces; characters that CORPUS lacks become
    unknown. Encode the index again: the smaller student is another one.
    """
    from d2llm.core.files import folder_bytes
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.models.student import Student
    from d2llm.models.vocabulary import lost_tokens
    from d2llm.models.vocabulary import prune_vocabulary as prune

    session = session_of(context)
    texts = open_corpus(corpus, **files.reading)
    loaded = Student.load(student, device="cpu", dtype="float32")
    pruned = prune(loaded, (passage.full_text for passage in texts.passages))
    pruned.save(out)
    before, after = (len(model.backbone.tokenizer) for model in (loaded, pruned))
    num_bytes = folder_bytes(out)
    report: dict[str, object] = {"tokens": before, "kept": after, "bytes": num_bytes}
    session.say(f"prune-vocabulary: {after:,} of {before:,} tokens stay; {num_bytes:,} bytes in {out}")
    if check:
        checked = open_corpus(check, **files.reading)
        lost = lost_tokens(loaded, pruned, (passage.full_text for passage in checked.passages))
        session.say(
            f"prune-vocabulary: of {lost.num_texts:,} texts to check, {lost.num_changed:,} have other tokens now; "
            f"{lost.num_unknown:,} of {lost.num_tokens:,} tokens are unknown"
        )
        report["check"] = lost
    warn_of_skipped(session, texts.skipped)
    warn_of_links(session, texts.links)
    session.write_report(context, json_path, report)


@verb("Distil")
def prune_neurons(
    context: typer.Context,
    student: StudentArgument,
    corpus: CorpusArgument,
    out: _OutOption,
    files: FileOptions,
    keep: Annotated[
        float, typer.Option(metavar="FRACTION", help="The fraction of the neurons of each layer that stays.")
    ] = 0.5,
    json_path: JsonOption = None,
) -> None:
    """Leave out neurons of the feed-forward layers.

    Those go that the others replace best in passages of CORPUS, of which it reads a thousand, and the others' weights
    make up for them. The smaller student is another one: train it further (training.start), or only fit its weights
    again (fit-scores), and encode the index again.
    """
    from d2llm.core.files import folder_bytes
    from d2llm.data.indexed_corpus import open_corpus
    from d2llm.models.neurons import num_neurons
    from d2llm.models.neurons import prune_neurons as prune
    from d2llm.models.student import Student

    session = session_of(context)
    texts = open_corpus(corpus, **files.reading)
    loaded = Student.load(student, device="cpu", dtype="float32")
    pruned = prune(loaded, (passage.full_text for passage in texts.passages), keep)
    pruned.save(out)
    before, after = (num_neurons(model) for model in (loaded, pruned))
    num_bytes = folder_bytes(out)
    session.say(f"prune-neurons: {after:,} of {before:,} neurons of each layer stay; {num_bytes:,} bytes in {out}")
    warn_of_skipped(session, texts.skipped)
    warn_of_links(session, texts.links)
    session.write_report(context, json_path, {"neurons": before, "kept": after, "bytes": num_bytes})
