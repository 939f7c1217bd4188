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

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2llm.models.device import weights_state
from d2llm.models.fitted_part import Widths
from d2llm.models.pooling import to_sphere
from d2llm.models.sources import write_arrays
from d2llm.models.tokens import ChosenTokens, StoredProjection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PART = "\ufffd"  # a token of some bytes of a character is decoded as this


class TokenProjection(ChosenTokens, nn.Module):
    """From the states of tokens to their vectors, of norm sqrt(token_dim): a linear map without bias.

    Attributes:
        weight: the map, [token_dim, dim].
        rarity: how rare each token is, [vocabulary], at least 0. Tokens of rarity 0, such as special tokens and
            punctuation, have no vectors.
        max_query_tokens: of a query only so many tokens have vectors, the rarest.
    """

    rarity: Tensor

    def __init__(self, dim: int, token_dim: int, rarity: Sequence[float], *, max_query_tokens: int = 16) -> None:
        """Args: ``dim`` of the states; ``token_dim`` of the vectors; ``rarity`` of each token of the vocabulary."""
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(token_dim, dim)))
        self.register_buffer("rarity", torch.tensor(rarity, dtype=torch.float32))
        self.max_query_tokens = max_query_tokens
        self.rarities: list[float] = self.rarity.tolist()
        self._hashed: tuple[list[tuple[int, int]], str] | None = None

    @property
    def dim(self) -> int:
        """Width of a token's vector."""
        return len(self.weight)

    def forward(self, states: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens token_dim"]:
        """The token embeddings, float32."""
        return to_sphere(states.float() @ self.weight.T)

    @property
    def fingerprint(self) -> str:
        """Content hash, computed again only if a weight has changed: every search compares it with the index's."""
        state = weights_state(self)
        if self._hashed is None or self._hashed[0] != state:
            weight, rarity = (tensor.detach().cpu().contiguous().numpy() for tensor in (self.weight, self.rarity))
            self._hashed = state, StoredProjection(weight, rarity, self.max_query_tokens).fingerprint
        return self._hashed[1]

    def write(self, folder: Path, student: str) -> None:
        """Write the projection into the folder of the student with this fingerprint."""
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in self.state_dict().items()}
        metadata = {"student": student, "max_query_tokens": str(self.max_query_tokens)}
        write_arrays(folder / self.file_name, arrays, metadata)

    @classmethod
    def read(cls, folder: Path, student: str, widths: Widths) -> TokenProjection | None:
        """The projection in the folder of the student with this fingerprint; None if there is none.

        Raises:
            ModelError: it cannot be read, does not fit the width of the states, or belongs to another student.
        """
        stored = StoredProjection.read(folder, student, widths)
        if stored is None:
            return None
        projection = cls(
            widths.states, len(stored.weight), stored.rarity.tolist(), max_query_tokens=stored.max_query_tokens
        )
        projection.load_state_dict(
            {"weight": torch.from_numpy(stored.weight), "rarity": torch.from_numpy(stored.rarity)}
        )
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
