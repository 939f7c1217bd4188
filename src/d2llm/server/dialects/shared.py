"""What the dialects have in common: names of models, limits, kinds of texts, orders of scores, bodies of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from d2llm.core.types import Task
from d2llm.models.backbone import TextKind
from d2llm.server.errors import Problem, ServingError, invalid
from d2llm.server.model_service import Encoded, ModelService
from d2llm.server.schemas import Answer
from d2llm.server.services import Services

Truncate = Literal["NONE", "END"]
SUFFIXES: tuple[TextKind, ...] = ("query", "passage")


class StrictBody(BaseModel):
    """A request's body: true is no number, and a field that the dialect does not know is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


class OpenBody(BaseModel):
    """The same for dialects that ignore what they do not know."""

    model_config = ConfigDict(strict=True, extra="ignore")


class CutOptions(OpenBody):
    """vLLM's options for cutting texts. What the student cannot do is refused."""

    truncate_prompt_tokens: Literal[-1] | None = Field(None, description="-1: cut to what the model reads.")
    truncation_side: Literal["right"] | None = Field(None, description="Texts are cut at the right, and nowhere else.")
    max_tokens_per_query: int | None = Field(None, ge=0, description="No less than the model reads; null or 0: all.")
    max_tokens_per_doc: int | None = Field(
        None,
        ge=0,
        validation_alias=AliasChoices("max_tokens_per_doc", "max_doc_length"),
        description="No less than the model reads; null or 0: all. Jina's name for it is max_doc_length.",
    )

    def check_limits(self, models: ModelService) -> None:
        """Refuse to cut to fewer tokens than the model reads.

        Raises:
            ServingError: 400, fewer are asked for.
        """
        check_limit(self.max_tokens_per_query, models.max_query_tokens, "max_tokens_per_query")
        check_limit(self.max_tokens_per_doc, models.max_passage_tokens, "max_tokens_per_doc")


class DocumentText(Answer):
    """A document."""

    text: str


class RerankResult(Answer):
    """A document's place: ``index`` in the request, and the probability that it is relevant."""

    index: int
    relevance_score: float = Field(ge=0, le=1)
    document: DocumentText | None = None


def _readable(value: Any) -> Any:
    """Say plainly what is wrong with a text or list of texts; a union's own errors name every alternative."""
    if not isinstance(value, list):
        if not isinstance(value, str) or not value:
            if value == "":
                raise PydanticCustomError("empty", "it is empty")
            raise ValueError("it is neither a text nor a list of texts")
        return value
    texts = cast("list[Any]", value)
    if not texts:
        raise PydanticCustomError("empty", "the list is empty; give at least one text")
    if all(isinstance(text, int | list) and not isinstance(text, bool) for text in texts):
        raise ValueError("token ids are not read here; send texts (LangChain: check_embedding_ctx_length=False)")
    for place, text in enumerate(texts):
        if text == "":
            raise PydanticCustomError("empty", "number {place} is empty", {"place": place})
        if not isinstance(text, str):
            raise ValueError(f"number {place} is no text")
    return texts


EMPTY = frozenset({"empty", "string_too_short", "too_short"})
"""The reasons of problems with a text or list that is empty."""
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[Text | Annotated[list[Text], Field(min_length=1)], BeforeValidator(_readable)]
"""A text or several."""
TextList = Annotated[list[Text], Field(min_length=1), BeforeValidator(_readable)]


def as_list(texts: str | list[str]) -> list[str]:
    """One text as a list of one."""
    return [texts] if isinstance(texts, str) else texts


def errors(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a route says of its errors in the API's description."""
    return {
        "4XX": {"model": model, "description": "The request cannot be answered as it is"},
        "5XX": {"model": model, "description": "The server is not ready, or failed"},
    }


def status_of(problem: Problem, invalid: int) -> int:
    """A problem's status where everything wrong with a body's content has the status ``invalid``."""
    is_about_content = problem.kind == "invalid_request" or (problem.kind == "too_large" and problem.field is not None)
    return invalid if is_about_content else problem.status


def find_model(models: ModelService, name: str | None, *, suffixes: bool = False) -> TextKind | None:
    """Check the name of a model; the kind of texts that its suffix names (":query"), if any.

    Raises:
        ServingError: 404, there is no such model.
    """
    if name is None or name == models.name:
        return None
    offered = [models.name, *(f"{models.name}:{suffix}" for suffix in SUFFIXES)] if suffixes else [models.name]
    if name not in offered:
        message = f"the model {name!r} does not exist; there is {', '.join(offered)}"
        raise ServingError(Problem(404, "not_found", message, "model"))
    return cast(TextKind, name.rpartition(":")[2])


def check_size(services: Services, texts: str | Sequence[str], field: str) -> None:
    """Hold a request to the server's limits.

    Raises:
        ServingError: 413, too many texts, or one too long.
    """
    settings = services.settings
    if isinstance(texts, str):
        _check_length({field: texts}, settings.max_text_chars)
        return
    if len(texts) > settings.max_texts:
        message = f"{field}: {len(texts):,} texts; a request may have {settings.max_texts:,}"
        raise ServingError(Problem(413, "too_large", message, field))
    _check_length({f"{field}.{place}": text for place, text in enumerate(texts)}, settings.max_text_chars)


def _check_length(texts: Mapping[str, str], limit: int) -> None:
    for field, text in texts.items():
        if len(text) > limit:
            message = f"{field}: {len(text):,} characters; {limit:,} are allowed"
            raise ServingError(Problem(413, "too_large", message, field))


def refuse_cut(texts: str | list[str], places: Sequence[int], field: str, limit: int, remedy: str) -> None:
    """Refuse texts of which the student would not read all; ``remedy`` says how to have them cut.

    Raises:
        ServingError: 413, with the first place and the limit.
    """
    if places:
        where = field if isinstance(texts, str) else f"{field}.{places[0]}"
        more = f" ({len(places) - 1} more are)" if len(places) > 1 else ""
        message = f"{where}: longer than the {limit} tokens that the model reads{more}; {remedy}"
        raise ServingError(Problem(413, "too_large", message, where))


def check_limit(tokens: int | None, limit: int, field: str) -> None:
    """Refuse to cut texts to fewer tokens than the model's ``limit``; 0 and None ask for nothing.

    Raises:
        ServingError: 400, fewer are asked for.
    """
    if tokens and tokens < limit:
        raise invalid(f"{field}: texts are cut to {limit} tokens here; ask for no less", field)


def check_dimensions(dimensions: int | None, models: ModelService) -> None:
    """Refuse vectors of another width than the student's.

    The first components of a vector are worth something alone only where a student was trained for it; none is yet.

    Raises:
        ServingError: 400, another width is asked for.
    """
    if dimensions is not None and dimensions != models.dim:
        message = (
            f"dimensions: this student's vectors have {models.dim} components and were not trained to be cut to "
            f"{dimensions}; leave dimensions out, or ask for {models.dim}"
            if dimensions < models.dim
            else f"dimensions: this student's vectors have {models.dim} components, {dimensions} were asked for"
        )
        raise invalid(message, "dimensions")


async def embed(services: Services, texts: Sequence[str], kind: TextKind) -> Encoded:
    """Vectors of texts, ready for inner products: queries as the anchor of the student's head has them."""
    models = services.models
    encoded = await models.encode(texts, kind)
    if kind == "passage" or not models.student.has_anchor:
        return encoded
    vectors = await models.anchor_queries(encoded.vectors, task_of(services))
    return Encoded(vectors, encoded.num_tokens, encoded.truncated)


def unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [n, dim] divided by their lengths; a vector of zeros stays."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def score_header(services: Services) -> dict[str, str]:
    """The header that says how numbers in [0, 1] are made of scores: calibrated on dev queries, or not."""
    return {"X-Relevance-Score": services.models.probability_kind(task_of(services))}


def best_first(logits: NDArray[np.float32], top: int | None = None) -> list[int]:
    """Places by falling score, equal ones as they came; the first ``top`` of them."""
    return np.argsort(-logits, kind="stable")[:top].tolist()


def cut_warnings(query_cut: bool, places: Sequence[int], models: ModelService) -> list[str]:
    """What to tell a client whose query or documents were cut."""
    query = [f"the query was cut to {models.max_query_tokens} tokens"] if query_cut else []
    return query + texts_cut("documents", places, models.max_passage_tokens)


def texts_cut(name: str, places: Sequence[int], limit: int) -> list[str]:
    """What to tell a client some of whose texts were cut."""
    return [f"{name} were cut to {limit} tokens: {', '.join(map(str, places))}"] if places else []


def warning_header(warnings: Sequence[str]) -> dict[str, str]:
    """The header that names texts that were cut, for dialects whose answers have no place for it."""
    return {"X-Warning": "; ".join(warnings)} if warnings else {}


def task_of(services: Services) -> Task:
    """What is asked of a pair: what the index is made for, else whether the passage answers the query."""
    return services.task


def rerank_results(
    services: Services, logits: NDArray[np.float32], documents: Sequence[str], top: int | None, *, with_texts: bool
) -> list[dict[str, Any]]:
    """The ``RerankResult`` of each of the ``top`` documents (None: of all), best first."""
    scores = services.models.probabilities(logits, task_of(services)).tolist()
    results: list[dict[str, Any]] = []
    for place in best_first(logits, top):
        result: dict[str, Any] = {"index": place, "relevance_score": scores[place]}
        results.append(result | ({"document": {"text": documents[place]}} if with_texts else {}))
    return results
