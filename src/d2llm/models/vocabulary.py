"""Leaves out of a student's vocabulary the tokens that some texts do not need.

Source: Abdaoui et al., "Load What You Need: Smaller Versions of Multilingual BERT", SustaiNLP 2020 (arXiv 2010.05609):
most weights of a multilingual encoder are embeddings of tokens of languages that its user does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import printable
from typing import Any, cast

import torch
from torch import nn

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.inputs import texts_of
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.models.tokens import TextKind

_BATCH = 1_000
_NO_LIMIT = 1 << 30
_MARKS = ("##", "▁")  # of WordPiece before what continues a word, of SentencePiece before what begins one


@dataclass(frozen=True, slots=True)
class LostTokens:
    """What a smaller vocabulary changes in some texts, read as passages.

    Attributes:
        num_texts: number of texts.
        num_changed: how many of them have other tokens than before; the vectors of all others are the same.
        num_tokens: number of tokens before.
        num_unknown: tokens that are unknown now, beyond those that were before.
    """

    num_texts: int
    num_changed: int
    num_tokens: int
    num_unknown: int


def prune_vocabulary(student: Student, texts: Iterable[str]) -> Student:
    """A smaller copy of a student, which knows the tokens of these texts, and their characters and ASCII's as tokens.

    The vectors of texts of these tokens stay the same, and with them all that was fitted to the student. In other
    texts, words are cut into smaller pieces; a character that no text had becomes the unknown token, or its whole word
    does with WordPiece (``lost_tokens`` counts both). The copy is saved with all weights of its backbone. It is another
    student: an index of the old one must be encoded again.

    Args:
        student: one whose tokenizer is WordPiece (BERT) or Unigram (XLM-R, multilingual E5).
        texts: all that is to be read as before, such as a corpus and typical queries.

    Raises:
        InputError: there are no texts, the tokenizer is another one, the student encodes with another engine than
            torch, or its backbone has no one set of weights.

    Example:
        >>> from d2llm.models.student import Student
        >>> from d2llm.models.vocabulary import lost_tokens, prune_vocabulary
        >>> student = Student.load("d2llm-minilm", device="cpu")
        >>> smaller = prune_vocabulary(student, ["Bees make honey.", "Tea is hot."])
        >>> len(smaller.backbone.tokenizer) < 200
        True
        >>> lost_tokens(student, smaller, ["Bees make tea.", "5 €"]).num_unknown
        1
    """
    student.backbone.require_merged("a smaller vocabulary")
    content = _content_of(student.backbone.tokenizer)
    kept = _kept_tokens(student, content, texts)
    pruned = student.changed_copy(["vocabulary", fingerprint_json(kept)], None, merged=True)
    pruned.backbone.tokenizer = _pruned_tokenizer(student.backbone.tokenizer, content, kept)
    _prune_embeddings(pruned.backbone.model, kept)
    projection = student.token_projection
    if projection is not None:
        rarity = projection.rarity[kept].tolist()
        smaller = TokenProjection(
            projection.weight.shape[1], projection.dim, rarity, max_query_tokens=projection.max_query_tokens
        )
        smaller.weight = projection.weight
        pruned.token_projection = smaller.eval()
    return pruned


def lost_tokens(student: Student, pruned: Student, texts: Iterable[str]) -> LostTokens:
    """What the smaller vocabulary of ``pruned`` changes in texts, against that of ``student``."""
    unknown = cast(str, student.backbone.tokenizer.unk_token)
    num_texts = num_changed = num_tokens = num_unknown = 0
    for batch in batched(texts, _BATCH):
        for before, after in zip(_tokens(student, batch), _tokens(pruned, batch), strict=True):
            num_texts += 1
            num_changed += before != after
            num_tokens += len(before)
            num_unknown += max(0, after.count(unknown) - before.count(unknown))
    return LostTokens(num_texts, num_changed, num_tokens, num_unknown)


def _tokens(student: Student, texts: Sequence[str]) -> list[list[str]]:
    rows = student.backbone.tokenize(texts, "passage", limit=_NO_LIMIT).ids
    return [cast("list[str]", student.backbone.tokenizer.convert_ids_to_tokens(ids)) for ids in rows]


def _content_of(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's file; an ``InputError`` if it is of a kind that is not pruned."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    kind = content.get("model", {}).get("type", type(tokenizer).__name__)
    post = (content.get("post_processor") or {}).get("type", "TemplateProcessing")
    if kind not in ("WordPiece", "Unigram") or post != "TemplateProcessing":
        raise InputError(
            "only vocabularies of the kinds WordPiece and Unigram, with a TemplateProcessing, can be pruned, but this "
            f"one is {kind} with {post}; use a student on minilm, e5 or another BERT or XLM-R"
        )
    return content


def _kept_tokens(student: Student, content: Mapping[str, Any], texts: Iterable[str]) -> list[int]:
    """The ids to keep, ascending: special tokens, those of the texts, and single characters.

    Those of ASCII are kept too: queries end with question marks, which a corpus may lack.
    """
    tokenizer = student.backbone.tokenizer
    used: set[int] = set()
    kinds: tuple[TextKind, ...] = ("query", "passage")
    for batch in batched(texts, _BATCH):
        for kind in kinds:  # whose prefixes may differ
            used.update(*student.backbone.tokenize(texts_of(batch), kind, limit=_NO_LIMIT).ids)
    if not used:
        raise InputError("there are no texts whose tokens could be kept; give a corpus")
    tokens: dict[str, int] = tokenizer.get_vocab()
    by_id = {token_id: token for token, token_id in tokens.items()}
    characters = {*printable, *(character for token_id in used for character in by_id[token_id])}
    used |= {token_id for token, token_id in tokens.items() if _bare(token) in characters}
    used |= {*tokenizer.all_special_ids, *(token["id"] for token in content["added_tokens"])}
    used |= {*range(1 + cast(int, tokenizer.pad_token_id or 0))}  # some models number positions from it
    if content["model"]["type"] == "Unigram":
        # An unknown character costs more than the dearest piece: without it, a text could be cut at another place.
        scores = [score for _, score in content["model"]["vocab"]]
        used.add(scores.index(min(scores)))
    return sorted(used)


def _bare(token: str) -> str:
    """A token without the mark of its place in a word."""
    for mark in _MARKS:
        token = token.removeprefix(mark) or token
    return token


def _pruned_tokenizer(tokenizer: Any, content: dict[str, Any], kept: Sequence[int]) -> Any:
    """A tokenizer made of ``content``, its file, which is changed."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    new_ids = {token_id: index for index, token_id in enumerate(kept)}
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][token_id] for token_id in kept if token_id < len(model["vocab"])]
        model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[token_id] for token, token_id in model["vocab"].items() if token_id in new_ids}
    for token in content["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    for special in (content["post_processor"] or {}).get("special_tokens", {}).values():
        special["ids"] = [new_ids[token_id] for token_id in special["ids"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **tokenizer.special_tokens_map,
        model_max_length=tokenizer.model_max_length,
    )


def _prune_embeddings(model: Any, kept: Sequence[int]) -> None:
    """Keep only these rows of a model's token embeddings, in place."""
    embeddings: nn.Embedding = model.get_input_embeddings()
    new_ids = {token_id: index for index, token_id in enumerate(kept)}
    padding = new_ids.get(-1 if embeddings.padding_idx is None else embeddings.padding_idx)
    weight = embeddings.weight.detach()[torch.tensor(kept, device=embeddings.weight.device)].clone()
    smaller = nn.Embedding.from_pretrained(weight, freeze=not embeddings.weight.requires_grad, padding_idx=padding)
    model.set_input_embeddings(smaller)
    model.config.vocab_size = len(kept)
    for name in ("pad", "bos", "eos", "cls", "sep", "mask"):
        if (token_id := getattr(model.config, f"{name}_token_id", None)) is not None:
            setattr(model.config, f"{name}_token_id", new_ids.get(token_id))
