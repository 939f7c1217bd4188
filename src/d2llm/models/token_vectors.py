"""Vectors of a text's tokens: the states of the backbone, projected to few dimensions.

One vector per text loses what its single tokens say. Each token of a query looks for the most similar token of a
passage, and the mean of these cosines is one more term of the score (``models.score_features``). This is the late
interaction of Khattab and Zaharia, "ColBERT", SIGIR 2020, here beside the text's vector and its words, and without
reading a text
again: its vector and those of its tokens come from the same pass through the backbone. Of a long query only the rarest
tokens have vectors, those that say what it is about; the others count as cosines of 0 in the mean.

The projection is trained after the student, on states that do not change (``training.fit_tokens``), and stored as
``tokens.safetensors`` in the student's folder. Vectors of texts do not depend on it, so an index is valid for the
student with or without it. An index with token embeddings names the projection that made them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from d2llm.core.errors import ModelError
from d2llm.models.fitted_part import Widths
from d2llm.models.pooling import to_sphere
from d2llm.models.sources import load_metadata, load_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PART = "\ufffd"  # a token of some bytes of a character is decoded as this


class TokenVectors(NamedTuple):
    """The vectors [sum of counts, token_dim] of the tokens of n texts, text after text, and their counts [n]."""

    vectors: NDArray[np.float32]
    counts: NDArray[np.int64]

    @classmethod
    def join(cls, texts: Sequence[NDArray[np.float32]], dim: int) -> TokenVectors:
        """The tokens of all texts, given by text."""
        counts = np.array([len(text) for text in texts], np.int64)
        return cls(np.concatenate([np.zeros((0, dim), np.float32), *texts]), counts)

    def split(self) -> list[NDArray[np.float32]]:
        """The vectors [tokens, token_dim] of each text."""
        return np.split(self.vectors, np.cumsum(self.counts)[:-1]) if len(self.counts) else []


class TokenProjection(nn.Module):
    """From the states of tokens to their vectors, of norm sqrt(token_dim): a linear map without bias.

    Attributes:
        weight: the map, [token_dim, dim].
        rarity: how rare each token is, [vocabulary], at least 0. Tokens of rarity 0, such as special tokens and
            punctuation, have no vectors.
        max_query_tokens: of a query only so many tokens have vectors, the rarest.
    """

    file_name: ClassVar[str] = "tokens.safetensors"
    rarity: Tensor

    def __init__(self, dim: int, token_dim: int, rarity: Sequence[float], *, max_query_tokens: int = 16) -> None:
        """Args: ``dim`` of the states; ``token_dim`` of the vectors; ``rarity`` of each token of the vocabulary."""
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(token_dim, dim)))
        self.register_buffer("rarity", torch.tensor(rarity, dtype=torch.float32))
        self.max_query_tokens = max_query_tokens
        self._rarity: list[float] = self.rarity.tolist()

    @property
    def dim(self) -> int:
        """Width of a token's vector."""
        return len(self.weight)

    def forward(self, states: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens token_dim"]:
        """The token embeddings, float32."""
        return to_sphere(states.float() @ self.weight.T)

    def places(self, token_ids: Sequence[int]) -> list[int]:
        """The places of a passage's tokens that get a vector."""
        return [place for place, token in enumerate(token_ids) if self._rarity_of(token) > 0]

    def query_places(self, token_ids: Sequence[int]) -> list[int]:
        """The places of a query's tokens that get a vector."""
        places = self.places(token_ids)
        places.sort(key=lambda place: -self._rarity_of(token_ids[place]))  # stable: of equal tokens the first
        return sorted(places[: self.max_query_tokens])

    def query_share(self, token_ids: Sequence[int]) -> float:
        """The share of a query's tokens that get a vector; 1 for all but long queries."""
        return min(1.0, self.max_query_tokens / max(len(self.places(token_ids)), 1))

    def _rarity_of(self, token: int) -> float:
        return self._rarity[max(token, ~token)]  # a query's tokens may be below 0 (``TokenizedTexts``)

    @property
    def fingerprint(self) -> str:
        """Content hash."""
        digest = hashlib.sha256()
        digest.update(str(self.max_query_tokens).encode())
        for tensor in (self.weight, self.rarity):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def write(self, folder: Path, student: str) -> None:
        """Write the projection into the folder of the student with this fingerprint."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"student": student, "max_query_tokens": str(self.max_query_tokens)}
        save_file(tensors, folder / self.file_name, metadata=metadata)

    @classmethod
    def read(cls, folder: Path, student: str, widths: Widths) -> TokenProjection | None:
        """The projection in the folder of the student with this fingerprint; None if there is none.

        Raises:
            ModelError: it cannot be read, does not fit the width of the states, or belongs to another student.
        """
        path = folder / cls.file_name
        if not path.is_file():
            return None
        remedy = "restore the student's folder, or delete the file and score_features.json to search without them"
        tensors = load_tensors(path, remedy=remedy)
        weight, rarity = tensors.get("weight"), tensors.get("rarity")
        if weight is None or rarity is None or weight.ndim != 2 or weight.shape[1] != widths.states or rarity.ndim != 1:
            raise ModelError(f"{path} does not fit a student whose states have {widths.states} dimensions; {remedy}")
        metadata = load_metadata(path)
        if (owner := metadata.get("student")) != student:
            raise ModelError(f"{path} was trained for the student {owner}, but this one is {student}; {remedy}")
        if not (limit := metadata.get("max_query_tokens", "")).isdecimal() or int(limit) < 1:
            raise ModelError(f"{path} does not say how many tokens of a query count; {remedy}")
        projection = cls(widths.states, len(weight), rarity.tolist(), max_query_tokens=int(limit))
        projection.load_state_dict(tensors)
        return projection.eval()


def skipped_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of special tokens and of tokens without a letter or digit, such as punctuation."""
    texts = tokenizer.batch_decode([[token_id] for token_id in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    return [
        token_id
        for token_id, text in enumerate(texts)
        if token_id in special or not any(character.isalnum() or character == _PART for character in text)
    ]
