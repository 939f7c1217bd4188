"""Code shared by the dialects: model names, limits, kinds of texts, rankings, bodies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from d2llm.models.tokens import TextKind
from d2llm.server.errors import Problem, ServingError, invalid
from d2llm.server.model_service import Encoded, ModelService, PassageScores
from d2llm.server.response_schemas import FastJSONResponse, ResponseBody, listed_vectors, response_of
from d2llm.server.schemas import KnownFields, accepted_names, field_names
from d2llm.server.services import Catalog
from d2llm.server.serving import Services

Truncate = Literal["NONE", "END"]
SUFFIXES: tuple[TextKind, ...] = ("query", "passage")


class ClientBody(KnownFields):
    """A request body with strict types. Unknown fields are errors, unless they are null, which asks for nothing.

    ``unused`` are fields of the interface that change no answer here. A field may have several names, but only one of
    them in a request; messages use that one.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    unused: ClassVar[frozenset[str]] = frozenset()
    _names: dict[str, str] = PrivateAttr(default_factory=dict[str, str])

    @model_validator(mode="wrap")
    @classmethod
    def _note_names(cls, body: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(body, dict):
            return handler(body)
        sent = cast("dict[str, Any]", body)
        names: dict[str, str] = {}
        for name, field in cls.model_fields.items():
            used = [alias for alias in field_names(name, field) if alias in sent]
            if len(used) > 1:
                kind = PydanticCustomError("twice", "{problem}", {"problem": f"it is the same as {used[0]}; send one"})
                raise ValidationError.from_exception_data(cls.__name__, [{"type": kind, "loc": (used[1],), "input": 0}])
            names[name] = used[0] if used else name
        known = accepted_names(cls)
        body = handler({name: v for name, v in sent.items() if name in known or not (v is None or name in cls.unused)})
        body._names = names
        return body

    def name_of(self, field: str) -> str:
        """The name under which a field was sent."""
        return self._names.get(field, field)


class CutOptions(ClientBody):
    """vLLM's options for cutting texts. Values that the student does not support are refused."""

    unused: ClassVar[frozenset[str]] = frozenset({"user", "priority", "request_id", "cache_salt"})
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="Truncate texts to the model's limit: -1, or that limit or more."
    )
    truncation_side: Literal["right"] | None = Field(None, description="Texts are only truncated at the right.")
    max_tokens_per_query: int | None = Field(
        None, ge=0, description="At least the model's limit; null or 0: that limit."
    )
    max_tokens_per_doc: int | None = Field(
        None,
        ge=0,
        validation_alias=AliasChoices("max_tokens_per_doc", "max_doc_length"),
        description="At least the model's limit; null or 0: that limit. Jina calls it max_doc_length.",
    )

    def check_limits(self, models: ModelService) -> None:
        """Refuse limits below the model's.

        Raises:
            ServingError: 400, a limit is below the model's.
        """
        most = max(models.max_query_tokens, models.max_passage_tokens)
        check_cut(self.truncate_prompt_tokens, most)
        check_limit(self.max_tokens_per_query, models.max_query_tokens, self.name_of("max_tokens_per_query"))
        check_limit(self.max_tokens_per_doc, models.max_passage_tokens, self.name_of("max_tokens_per_doc"))


class DocumentText(ResponseBody):
    """A document."""

    text: str


class RerankResult(ResponseBody):
    """A ranked document: its ``index`` in the request, and the probability that it is relevant."""

    index: int
    relevance_score: float = Field(ge=0, le=1)
    document: DocumentText | None = None


def _readable(value: Any) -> Any:
    """Give a clear error for an invalid text or list of texts; a union's own errors name every alternative."""
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
        raise ValueError("token ids are not supported; send texts (LangChain: check_embedding_ctx_length=False)")
    for index, text in enumerate(texts):
        if text == "":
            raise PydanticCustomError("empty", "number {place} is empty", {"place": index})
        if not isinstance(text, str):
            raise ValueError(f"number {index} is not a text")
    return texts


EMPTY = frozenset({"empty", "string_too_short", "too_short"})
"""The reasons of problems with empty texts or lists."""
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)], BeforeValidator(_readable)]
"""A text or several."""
TextList = Annotated[list[Text], Field(min_length=1, fail_fast=True), BeforeValidator(_readable)]


NumberType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
"""How vectors are written, by Cohere's names."""


def _refused(value: Any) -> None:
    if value is not None:
        raise ValueError("it is not supported: this server embeds texts alone; leave it out")


TextsOnly = Annotated[None, BeforeValidator(_refused)]
"""A field for what is not text, such as images: null, or an error."""


def errors(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Descriptions of a route's errors for the OpenAPI document."""
    return {
        "4XX": {"model": model, "description": "The request is invalid or refused"},
        "5XX": {"model": model, "description": "The server is not ready, or failed"},
    }


def status_of(problem: Problem, invalid: int) -> int:
    """A problem's status if all errors in a body's content have the status ``invalid``."""
    is_about_content = problem.kind == "invalid_request" or (problem.kind == "too_large" and problem.field is not None)
    return invalid if is_about_content else problem.status


def offered_models(catalog: Catalog, *, suffixes: bool = False) -> dict[str, tuple[str | None, TextKind | None]]:
    """The index, and the kind of texts given by a suffix (":query"), for each name that a model may have."""
    offered: dict[str, tuple[str | None, TextKind | None]] = {}
    for name, index in catalog.model_names.items():
        offered[name] = index, None
        offered |= {f"{name}:{kind}": (index, kind) for kind in SUFFIXES if suffixes}
    return offered


def select_model(catalog: Catalog, name: str | None, *, suffixes: bool = False) -> tuple[Services, TextKind | None]:
    """The services that a model's name stands for, and the kind of texts given by its suffix, or None.

    Raises:
        ServingError: 404, there is no such model. 403, the key is for other indexes. 400, none is named and there are
            several.
    """
    if name is None:
        return catalog.select(field="model"), None
    offered = offered_models(catalog, suffixes=suffixes)
    if name not in offered:
        raise ServingError(catalog.problem_of_model(name, [*offered]))
    index, kind = offered[name]
    return catalog.select(index), kind


@dataclass(frozen=True, slots=True)
class SizedTexts:
    """Texts within the server's limits, to be read by the student.

    Attributes:
        texts: the texts.
        cut: the places of those whose ends were left out for the server's limits.
        where: the field of each place.
        limit: how many tokens of a text the student reads.
        remedy: how to allow that texts are cut, if it is not allowed.
    """

    texts: list[str]
    cut: frozenset[int]
    where: Callable[[int], str]
    limit: int
    remedy: str | None

    def warn(self, truncated: Sequence[int], name: str) -> list[str]:
        """Warnings for a client if the ends of some texts were not read: those that were cut, and the ``truncated``.

        Raises:
            ServingError: 413, with the place of the first such text, and the limit, if cutting is not allowed.
        """
        positions = sorted(self.cut.union(truncated))
        if not positions:
            return []
        if self.remedy is None:
            return [f"{name}: truncated to {self.limit} tokens, at positions {', '.join(map(str, positions))}"]
        more = f" (and {len(positions) - 1} more)" if len(positions) > 1 else ""
        field = self.where(positions[0])
        message = f"{field}: longer than the {self.limit} tokens that the model reads{more}; {self.remedy}"
        raise ServingError(Problem(413, "too_large", message, field))


def check_size(
    services: Services, texts: str | Sequence[str], field: str, kind: TextKind = "passage", remedy: str | None = None
) -> SizedTexts:
    """Check the number and length of texts against the server's limits.

    Without a ``remedy``, the client has asked to truncate texts that are too long, so their ends are left out, whatever
    their length: a student reads far less than the server's limit. Otherwise they are refused, and it says how to
    allow it.

    Raises:
        ServingError: 413, there are too many texts, or one is too long.
    """
    settings, models = services.settings, services.models
    several = [texts] if isinstance(texts, str) else list(texts)
    if len(several) > settings.max_texts:
        message = (
            f"{field}: {len(several):,} texts; this server takes {settings.max_texts:,} in a request (max_texts). Send "
            f"them in parts, as clients do when told to (chunk_size or batch size = {settings.max_texts})"
        )
        raise ServingError(Problem(413, "too_large", message, field))

    def where(position: int) -> str:
        return field if isinstance(texts, str) else f"{field}.{position}"

    limit = settings.max_text_chars
    too_long = [position for position, text in enumerate(several) if len(text) > limit]
    if too_long and remedy is not None:
        position = too_long[0]
        message = f"{where(position)}: {len(several[position]):,} characters; {limit:,} are allowed (max_text_chars)"
        raise ServingError(Problem(413, "too_large", message, where(position)))
    return SizedTexts(
        [text[:limit] for text in several] if too_long else several,
        frozenset(too_long),
        where,
        models.max_query_tokens if kind == "query" else models.max_passage_tokens,
        remedy,
    )


async def score_documents(
    services: Services, query: str, documents: Sequence[str], field: str = "documents", remedy: str | None = None
) -> tuple[PassageScores, list[str]]:
    """The scores of documents for a query, and warnings about texts that were cut; ``remedy`` as for ``check_size``.

    Raises:
        ServingError: 413, there are too many documents, or a text is too long.
    """
    sized_query = check_size(services, query, "query", "query", remedy)
    sized = check_size(services, documents, field, "passage", remedy)
    scored, models = await services.score(sized_query.texts, sized.texts)
    is_cut = sized_query.warn(scored.truncated_queries, "query")
    warnings = [f"the query was truncated to {models.max_query_tokens} tokens"] if is_cut else []
    return scored, warnings + sized.warn(scored.truncated, "documents")


def check_limit(tokens: int | None, limit: int, field: str) -> None:
    """Refuse to truncate texts to fewer tokens than the model's ``limit``; 0 and None are always accepted.

    Raises:
        ServingError: 400, ``tokens`` is below the limit.
    """
    if tokens and tokens < limit:
        raise invalid(f"{field}: texts are truncated to {limit} tokens; give no less", field)


def check_cut(tokens: int | None, limit: int) -> None:
    """Check vLLM's ``truncate_prompt_tokens``: -1, or at least the model's ``limit``, at which texts are cut anyway.

    Raises:
        ServingError: 400, it is below the limit.
    """
    if tokens is not None and 0 <= tokens < limit:
        message = f"truncate_prompt_tokens: texts are truncated to {limit} tokens; give no less, or -1"
        raise invalid(message, "truncate_prompt_tokens")


DIMENSIONS = "The width of the student's vectors, or a smaller one that it was trained for."
"""Describes the field ``dimensions``."""


def check_dimensions(dimensions: int | None, models: ModelService, field: str = "dimensions") -> int:
    """The width of the vectors to answer: ``dimensions``, or all of them; ``field`` is its name in the interface.

    Vectors are only useful without their last components if the student was trained for it (``Student.nested_dims``).

    Raises:
        ServingError: 400, the student was not trained for this width.
    """
    widths = (*models.student.nested_dims, models.dim)
    if dimensions is not None and dimensions not in widths:
        message = (
            f"{field}: this student's vectors have {models.dim} components and were not trained to be cut to "
            f"{dimensions}; leave {field} out, or set it to {' or '.join(map(str, widths))}"
            if dimensions < models.dim
            else f"{field}: this student's vectors have {models.dim} components, not {dimensions}"
        )
        raise invalid(message, field)
    return dimensions or models.dim


async def embed(services: Services, texts: Sequence[str], kind: TextKind) -> Encoded:
    """Vectors of texts, ready for inner products: for queries, the query vectors of the student's head."""
    models = services.models
    encoded = await models.encode(texts, kind)
    if kind == "passage" or not models.student.has_dot:
        return encoded
    vectors = await models.query_vectors(encoded.vectors, services.task)
    return Encoded(vectors, encoded.num_tokens, encoded.truncated)


def unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [n, dim] divided by their lengths; zero vectors are unchanged."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


async def embed_tokens(services: Services, texts: Sequence[str], kind: TextKind, field: str) -> Encoded:
    """Vectors of texts and, as ``tokens``, of their tokens, of length 1, or a fraction of it in long queries.

    The sum over a query's tokens of the highest product with a passage's, divided by their number, is what the
    student's score counts (``maxsim``).

    An answer has no more numbers than the vectors of as many texts as a request may have.

    Raises:
        ServingError: 400, the student has no token embeddings; 413, the texts in ``field`` have too many tokens.
    """
    models, limit = services.models, services.settings.max_texts * services.models.dim
    if models.student.token_dim is None:
        raise invalid(f"{models.name} has no token embeddings; take another student, or train them (d2llm fit-tokens)")
    encoded = await models.encode(texts, kind, with_tokens=True)
    assert encoded.tokens is not None
    if (size := sum(tokens.size for tokens in encoded.tokens)) > limit:
        message = (
            f"{field}: the vectors of their tokens have {size:,} numbers; this server returns {limit:,} in an answer"
        )
        raise ServingError(
            Problem(413, "too_large", f"{message} (max_texts vectors); send fewer texts at a time", field)
        )
    return replace(encoded, tokens=[tokens / np.float32(models.student.token_dim**0.5) for tokens in encoded.tokens])


def typed_vectors(vectors: NDArray[np.float32], kind: NumberType) -> list[Any]:
    """Vectors [n, dim] of length 1 as the items of a body, with other numbers.

    int8 has 127 times each component, rounded; binary packs the signs, eight components to a byte, 1 for those above 0.
    The unsigned forms are the signed ones plus 128.
    """
    if kind in ("float", "base64"):
        return listed_vectors(vectors, kind)
    if kind.endswith("binary"):
        numbers = np.packbits(vectors > 0, axis=1).astype(np.int16) - 128
    else:
        numbers = np.rint(vectors * 127).astype(np.int16)
    return list(numbers + 128 if kind.startswith("u") else numbers)


async def embeddings_response(
    values: Sequence[Any], model: str, num_tokens: int, headers: dict[str, str]
) -> FastJSONResponse:
    """The response of ``/v1/embeddings`` with a vector for each text, as OpenAI and Jina write it."""
    response = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)],
        "model": model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return await response_of(lambda: response, len(values), headers)


def score_header(services: Services, scored: PassageScores) -> dict[str, str]:
    """The header that says how scores become numbers in [0, 1], and by what words are weighted."""
    kind = services.models.probability_kind(scored.corpus.task, scored.corpus.weights)
    return {"X-Relevance-Score": kind} | word_header(scored)


def word_header(scored: PassageScores) -> dict[str, str]:
    """The header that names the index whose words tell how rare a word is, or the background."""
    return {"X-Word-Statistics": scored.corpus.name} if scored.corpus.weights.counts_words else {}


def best_first(logits: NDArray[np.float32], top: int | None = None) -> list[int]:
    """The first ``top`` places by decreasing score; ties keep their order."""
    return np.argsort(-logits, kind="stable")[:top].tolist()


def warning_header(warnings: Sequence[str]) -> dict[str, str]:
    """The header that names truncated texts, for dialects whose answers have no field for it."""
    return {"X-Warning": "; ".join(warnings)} if warnings else {}


def rerank_results(
    services: Services, scored: PassageScores, documents: Sequence[str], top: int | None, *, with_texts: bool
) -> list[dict[str, Any]]:
    """The ``RerankResult`` of each of the ``top`` documents (None: of all), best first."""
    scores = services.models.probabilities(scored).tolist()
    results: list[dict[str, Any]] = []
    for index in best_first(scored.scores, top):
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        results.append(result | ({"document": {"text": documents[index]}} if with_texts else {}))
    return results
