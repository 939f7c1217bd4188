"""The verbs ``duplicates`` and ``cluster``: passages of an index that mean the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2llm.cli.options import DeviceOption, DtypeOption, EngineOption, JsonOption, output_file, student_option
from d2llm.cli.search import QueryOptions
from d2llm.cli.session import session_of
from d2llm.cli.verbs import verb
from d2llm.core.names import counted
from d2llm.retrieval.settings import ClassifySettings, SimilaritySettings

if TYPE_CHECKING:
    from d2llm.retrieval.index import Index
    from d2llm.retrieval.similar import SimilarPairs

LinesOption = Annotated[
    Path, typer.Option("--out", metavar="PATH", dir_okay=False, callback=output_file, help="Where the lines go.")
]
STANDARD_OUTPUT = Path("-")
_TEXTS_AT_ONCE = 1_024


@dataclass(frozen=True)
class OpenedIndex:
    """An index, and how its student is run."""

    index: Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder.")]
    student: Annotated[str | None, student_option(help="The student that made the index, if it has moved since.")] = (
        None
    )
    device: DeviceOption = None
    dtype: DtypeOption = None
    engine: EngineOption = "auto"

    def open(self) -> Index:
        """The index with its student loaded."""
        from d2llm.retrieval.index import Index

        return Index.open(self.index, self.student, device=self.device, dtype=self.dtype, engine=self.engine)


@verb("Search")
def duplicates(
    context: typer.Context,
    opened: OpenedIndex,
    settings: SimilaritySettings,
    out: LinesOption = STANDARD_OUTPUT,
    json_path: JsonOption = None,
) -> None:
    """Find near duplicates and paraphrases in an index.

    Each passage is compared with its nearest ones by the full score. A JSON line is a pair, the most probable first.
    """
    from d2llm.retrieval.similar import similar_pairs

    index = opened.open()
    found = similar_pairs(index, settings)
    session_of(context).write_lines(out, _pair_lines(index, found))
    _say(context, f"duplicates: {counted(len(found.pairs), 'pair')}", found)
    session_of(context).write_report(context, json_path, found)


@verb("Search")
def cluster(
    context: typer.Context,
    opened: OpenedIndex,
    settings: SimilaritySettings,
    out: LinesOption = STANDARD_OUTPUT,
    json_path: JsonOption = None,
) -> None:
    """Group the passages of an index that mean the same.

    A JSON line is a passage in a cluster, the largest cluster first. Every member is similar to the centre of its
    cluster. A lower threshold makes larger clusters.
    """
    from d2llm.retrieval.similar import clusters_of, similar_pairs

    index = opened.open()
    found = similar_pairs(index, settings)
    clusters = clusters_of(found)
    rows = (
        {"cluster": rank, "id": name, "probability": probability, "text": passage.full_text}
        for rank, one in enumerate(clusters, start=1)
        for members in ({one.centre: 1.0, **one.members},)
        for (name, probability), passage in zip(members.items(), index.get([*members]), strict=True)
    )
    session_of(context).write_lines(out, rows)
    num_members = sum(1 + len(one.members) for one in clusters)
    _say(context, f"cluster: {counted(len(clusters), 'cluster')} of {counted(num_members, 'passage')}", found)
    session_of(context).write_report(context, json_path, {"clusters": clusters, "num_passages": found.num_passages})


def _pair_lines(index: Index, found: SimilarPairs) -> Iterator[dict[str, object]]:
    from dataclasses import asdict

    from d2llm.core.batches import batched

    for pairs in batched(found.pairs, _TEXTS_AT_ONCE):
        passages = index.get(name for pair in pairs for name in (pair.first, pair.second))
        texts = {passage.id: passage.full_text for passage in passages}
        for pair in pairs:
            yield {**asdict(pair), "first_text": texts[pair.first], "second_text": texts[pair.second]}


def _say(context: typer.Context, result: str, found: SimilarPairs) -> None:
    session, blank = session_of(context), f"; {found.num_blank:,} without text" if found.num_blank else ""
    session.say(f"{result}; {counted(found.num_passages, 'passage was', 'passages were')} compared{blank}")
    if found.num_full:
        session.complain(
            "warning",
            f"{counted(found.num_full, 'passage has', 'passages have')} as many similar ones as were compared; a "
            "larger --neighbours finds more",
        )


@verb("Search")
def classify(
    context: typer.Context,
    opened: OpenedIndex,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="What to classify; all words are one text.")
    ] = None,
    *,
    more: QueryOptions,
    settings: ClassifySettings,
    out: LinesOption = STANDARD_OUTPUT,
    json_path: JsonOption = None,
) -> None:
    """Classify texts by examples of each class in an index.

    Five to fifty examples of a class are enough. A JSON line is a text with its class and probability. The label is
    null if the text probably belongs to no class.
    """
    from d2llm.retrieval.classify import Classifier

    session = session_of(context)
    texts = more.read(session, opened.index, words or [])
    classifier = Classifier(opened.open(), settings)
    results = classifier.classify(texts)
    session.write_lines(out, results)
    num_none = sum(result.label is None for result in results)
    texts, classes = counted(len(results), "text"), counted(len(classifier.labels), "class", "classes")
    session.say(f"classify: {texts}, {classes}; {num_none:,} belong to none")
    session.write_report(context, json_path, results)
