"""The model card of a student: a README.md with YAML front matter for the Hub and a body for people.

Nothing is measured here: the figures are those recorded in the manifest during training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from d2llm.core.table import Column, Table
from d2llm.models.export.sentence_transformers import task_of_plain, why_not_plain
from d2llm.models.probabilities import ProbabilityCalibration
from d2llm.models.score_features import ScoreFeatures
from d2llm.models.sources import HUB_ID, hub_name
from d2llm.models.student_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BACKBONE_FOLDER,
    CARD_FILE,
    MODULES_FILE,
    trained_tasks,
)
from d2llm.models.tokens import search_query_tokens
from d2llm.recipe import BackboneConfig, StudentConfig

_HUB_DATA = "hf://"
_LINE = 120  # characters of a line of a card
_TAGS = ["d2llm", "semantic-search", "dense-retrieval", "reranking"]
_LIBRARY_TAG = "sentence-transformers"
_HEADS = {
    "dot": "an inner product of the two vectors, which any vector index can search, plus a bounded interaction",
    "paper": "an interaction network on the two vectors (the head of the D2LLM paper)",
    "cosine": "the cosine of the two vectors",
    "product": "the inner product of the vectors as they are",
    "divergence": "the divergence of two normal distributions, as an inner product",
}

_USE = """```python
from d2llm import Student

student = Student.from_pretrained("...")  # the name of this repository, or a folder with these files
query = student.encode_queries(["how do I read a file line by line?"]).vectors[0]
passages = student.encode_passages(["Iterating over an open file gives its lines."]).vectors
print(student.score(query, passages, task="asymmetric"))
```"""

_PLAIN_SECTION = re.compile(r"<!-- sentence-transformers:begin -->.*?<!-- sentence-transformers:end -->\n?", re.DOTALL)
_PLAIN = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("...")  # the name of this repository, or a folder with these files
queries = model.encode_query(["how do I read a file line by line?"])
passages = model.encode_document(["Iterating over an open file gives its lines."])
print(model.similarity(queries, passages))
```"""


def model_card(folder: Path, manifest: Mapping[str, Any], *, licence: str | None = None) -> str:
    """The text of README.md for the student in ``folder``.

    The text of an existing card is kept: only missing front matter fields are added, and the section on plain
    sentence-transformers, which is delimited by markers, is rewritten. ``licence`` is an identifier of the Hub
    ("apache-2.0") that replaces the card's.
    """
    from huggingface_hub import ModelCard, ModelCardData  # takes half a second, and only cards need it

    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else _body(folder, manifest)
    card = ModelCard(text) if text.startswith("---\n") else None
    metadata: dict[str, Any] = card.data.to_dict() if card is not None else {}
    body: str = card.text if card is not None else text
    fields: dict[str, Any] = _front_matter(folder, manifest) | metadata
    if licence is not None:
        fields["license"] = licence
    if why_not_loadable(folder, manifest) is None and _LIBRARY_TAG not in (tags := fields.get("tags") or []):
        fields["tags"] = [*tags, _LIBRARY_TAG]
    section = f"<!-- sentence-transformers:begin -->\n{_plain(folder, manifest)}\n<!-- sentence-transformers:end -->\n"
    if not _PLAIN_SECTION.search(body):
        body = f"{body.rstrip()}\n\n{section}"
    body = _PLAIN_SECTION.sub(lambda _: section, body, count=1)
    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n\n{body.lstrip()}"


def why_not_loadable(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """Why plain sentence-transformers, without d2llm, cannot load a student's folder; None if it can."""
    if (folder / MODULES_FILE).is_file():
        return None
    if (reason := why_not_plain(StudentConfig.model_validate(manifest["config"]))) is not None:
        return reason
    return (
        "its folder holds only what training changed, and the rest is not on the Hub with the same weights and layers; "
        "`d2llm push` and `Student.save(folder, merge=True)` write all weights"
    )


def card_licence(card: str) -> str | None:
    """The licence in the front matter of a card; None if there is none."""
    from huggingface_hub import ModelCard

    licence: object = ModelCard(card).data.to_dict().get("license")
    return None if licence is None else str(licence)


def _front_matter(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    base = hub_name(str(manifest["config"]["backbone"]["model"]))
    paths = [str(source["path"]) for source in _recorded(manifest, "recipe", "data")]
    data = [path.removeprefix(_HUB_DATA).partition(":")[0] for path in paths if path.startswith(_HUB_DATA)]
    fields: dict[str, Any] = {"library_name": "d2llm", "pipeline_tag": "sentence-similarity", "tags": list(_TAGS)}
    if HUB_ID.fullmatch(base) and manifest["config"]["backbone"].get("remote") is None:
        fields["base_model"] = base
        if (folder / BACKBONE_FOLDER).is_dir():
            fields["base_model_relation"] = "finetune"
        elif (folder / ADAPTER_FILE).is_file():
            fields["base_model_relation"] = "adapter"
    if data:
        fields["datasets"] = list(dict.fromkeys(data))
    return fields


def _recorded(manifest: Mapping[str, Any], *keys: str) -> Any:
    """The manifest's value under nested keys; an empty list if absent, since students can be saved without a run."""
    value: Any = manifest
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if value is not None else []


def _body(folder: Path, manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    backbone, head = config["backbone"], config["interaction"]["head"]
    read_by = BackboneConfig(**backbone)
    base, num_query_tokens = hub_name(read_by.model), search_query_tokens(read_by)
    about = (
        "A model for semantic search. It encodes each text once, on its own, and scores a query and a passage by their "
        f"vectors: {_HEADS.get(head, head)}. Distilled with d2llm by the method of D2LLM (Liao et al., ACL 2024, "
        "[arXiv 2406.17262](https://arxiv.org/abs/2406.17262))."
    )
    where = "" if read_by.address is None else ", behind an embedding API that every text is sent to"
    # Only the last part of a folder's path: where it lies on somebody's machine is private.
    facts = (
        f"- Backbone: {base if HUB_ID.fullmatch(base) else Path(base).name}{where}\n"
        f"- Reads at most {num_query_tokens} tokens of a query and {backbone['max_passage_tokens']} of a "
        f"passage; longer texts are cut, and counted\n- Fingerprint: `{manifest['fingerprint']}`"
    )
    use = _USE.replace("asymmetric", task_of_plain(manifest))
    sections = [
        about,
        facts,
        "## Use",
        use,
        *_probabilities(folder, manifest),
        *_training(manifest),
        *_figures(manifest),
    ]
    return "\n\n".join(["# A d2llm student", *sections]) + "\n"


def _probabilities(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What the student's probabilities mean and how reliable they were on dev; nothing if it has none."""
    calibration = ProbabilityCalibration.read(folder, manifest["fingerprint"])
    if not calibration:
        return []
    note = (
        "Scores only rank passages; `student.calibration.probabilities(scores, task)`, and a server's relevance "
        f"scores, say how likely a passage is relevant if {calibration.base_rate:.0%} of the passages are (1 relevant, "
        f"{calibration.num_hard} sharing the query's words, {calibration.num_random} drawn at random). For another "
        "mixture they are not the fraction of relevant passages, but the ranking is unchanged."
    )
    figures = Column("expected calibration error before", ".3f"), Column("after", ".3f")
    table = Table("score", Column("dev queries"), *figures)
    whole = {f"{task}, with words and tokens": fitted for task, fitted in calibration.with_features.items()}
    for name, fitted in {**calibration.tasks, **whole}.items():
        table.add_row(name, sum(fitted.num_queries.values()), fitted.error_before, fitted.error_after)
    return ["## Probabilities", note, table.to_markdown()]


def _plain(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Whether sentence-transformers can load the student, and what it then computes."""
    backbone = manifest["config"]["backbone"]
    num_query_tokens = search_query_tokens(BackboneConfig(**backbone))
    if (reason := why_not_loadable(folder, manifest)) is not None:
        return f"## Without d2llm\n\n{_filled(f'Sentence-transformers alone cannot load it: {reason}.')}"
    base = ""
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        base = f", with the package `peft`, and {hub_name(backbone['model'])} from the Hub"
    numbers = (
        f"{_scope(folder, manifest)} In float32 the numbers equal d2llm's up to rounding (a relative difference of "
        f"1e-5). `encode_query` reads at most {num_query_tokens} tokens; `encode_document`, and plain `encode`, read "
        f"at most {backbone['max_passage_tokens']}, as a passage. Longer texts are cut without a warning."
        f"{_empty_texts(folder)}"
    )
    loads = f"Sentence-transformers (6 or newer) loads it{base}:"
    return f"## Without d2llm\n\n{_filled(loads)}\n\n{_PLAIN}\n\n{_filled(numbers)}"


def _filled(text: str) -> str:
    """A paragraph in lines, none of which ends in code."""
    whole = re.sub("`[^`]+`", lambda code: code[0].replace(" ", "\0"), text)
    return fill(whole, _LINE, break_on_hyphens=False).replace("\0", " ")


def _scope(folder: Path, manifest: Mapping[str, Any]) -> str:
    """What the library computes of the student's score, and what it leaves out."""
    task, config = task_of_plain(manifest), StudentConfig.model_validate(manifest["config"]).interaction
    if not config.has_network:
        scope = "That is this student's full score."
    elif task in config.tasks:
        scope = (
            f"That is the inner product of the student's score ({task} search), without its interaction, which only "
            "d2llm computes."
        )
    else:
        scope = f"That is this student's full score in {task} search."
    trained = trained_tasks(manifest)
    if config.has_network and len(trained) > 1:
        other = next(other_task for other_task in trained if other_task != task)
        scope += f" The inner product of {other} search is another one, which only d2llm computes."
    score_features = ScoreFeatures.read(folder, manifest["fingerprint"])
    if score_features and score_features.weights(task):
        scope += " What an index of d2llm adds to it (words, token embeddings) is left out."
    return scope


def _empty_texts(folder: Path) -> str:
    """A warning if the tokenizer makes no token of an empty text; d2llm then reads its closing token."""
    from tokenizers import Tokenizer

    folder = folder / BACKBONE_FOLDER if (folder / BACKBONE_FOLDER).is_dir() else folder
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer.encode("").ids:
        return ""
    return (
        " Its tokenizer makes no token of an empty text: d2llm reads a closing token there, but the library fails, or "
        "in a batch with other texts returns another vector, so leave empty texts out."
    )


def _training(manifest: Mapping[str, Any]) -> list[str]:
    sources: Sequence[Mapping[str, Any]] = _recorded(manifest, "recipe", "data")
    if not sources:
        return []
    rows = [f"- {_name(str(source['path']))} ({source['task']})" for source in sources]
    return ["## Training data", "\n".join(rows)]


def _figures(manifest: Mapping[str, Any]) -> list[str]:
    """The dev measures that training recorded, if any."""
    measured: Mapping[str, Mapping[str, Any]] = _recorded(manifest, "dev")
    if not measured:
        return ["## Figures", "None were recorded with this student."]
    weights: Mapping[str, float] = _recorded(manifest, "interaction_weights") or {}
    tasks = {_name(str(source["path"])): source["task"] for source in _recorded(manifest, "recipe", "data")}
    table = Table("dev set", Column("before training", ".3f"), Column("as kept", ".3f"))
    for name, measures in measured.items():
        kept = measures.get("by_weight", {}).get(str(float(weights.get(tasks.get(name, ""), -1.0))))
        table.add_row(name, measures.get("start"), kept)
    note = (
        "Dev measures recorded during training (nDCG@10 for retrieval sets; for sets of pairs, the measure used to "
        "choose the step). The step and the weight of the interaction were chosen on these sets, so the figures are "
        "optimistic."
    )
    return ["## Figures", note, table.to_markdown()]


def _name(path: str) -> str:
    return path if path.startswith(_HUB_DATA) else Path(path).name
