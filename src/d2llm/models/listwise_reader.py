"""A causal language model that reads the first passages of a search as vectors between its tokens, and ranks them.

PE-Rank (Liu et al., "Leveraging Passage Embeddings for Efficient Listwise Reranking with Large Language Models", 2024,
arXiv 2406.14848): the model reads the query's text and, for each passage, one vector, which a small network makes from
the student's. Next in the ranking is the passage whose vector has the largest inner product with the last state; its
vector is then read too. ``training.tune_reader`` trains the network, first to let the model repeat texts from their
vectors, and adapters of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from d2llm.core.errors import DataFormatError, InputError, MismatchError, ModelError
from d2llm.core.files import new_folder, write_bytes
from d2llm.core.fingerprint import fingerprint_json
from d2llm.core.inputs import texts_of
from d2llm.core.manifest import FILE_NAME as MANIFEST
from d2llm.core.manifest import read_manifest, write_manifest
from d2llm.core.shipped import name_student
from d2llm.models.backbone import Backbone
from d2llm.models.device import inference, size_of_states, tokens_to_read
from d2llm.models.length_limit import readable_tokens
from d2llm.models.pretrained import is_decoder
from d2llm.models.sources import load_tensors
from d2llm.recipe import BackboneConfig

READER_KIND, READER_FORMAT_VERSION = "reader", 1
_FILE = "reader.safetensors"
_RESTORE = "restore the reader's folder or tune it again"
_QUERY_TOKENS = 64  # the rest of a longer query is not read
_TEXT_TOKENS = 64  # of a passage, in training alone
_INITIAL_SCALE = 10.0


class ReadOrder(NamedTuple):
    """What a reader made of n passages: the logits of the first step, and places in the order of the drawing.

    Passages that were not drawn follow in the order in which they were read.
    """

    logits: Float32[np.ndarray, " passages"]
    order: Int64[np.ndarray, " passages"]


class ListwiseReader(nn.Module):
    """A language model that ranks passages which it reads as vectors (PE-Rank).

    Attributes:
        backbone: the language model.
        vector_dim: width of the passages' vectors.
        student: fingerprint of the student that makes these vectors.
        steps: how many passages are drawn, at most.
    """

    def __init__(self, backbone: Backbone, vector_dim: int, student: str, *, steps: int = 10, seed: int = 0) -> None:
        """Put an untrained network between a student's vectors and a language model.

        Raises:
            InputError: the backbone is not a causal language model.
        """
        super().__init__()
        if not is_decoder(backbone.model.config) or backbone.config.bidirectional:
            raise InputError(
                f"'{backbone.config.model}' ({type(backbone.model).__name__}) is not a causal language model, and "
                "cannot draw a ranking; use one, such as smollm2"
            )
        self.backbone = backbone
        self.vector_dim = vector_dim
        self.student = student
        self.steps = steps
        with torch.no_grad():
            embeddings = self._tokens(range(cast(Any, backbone.model.get_input_embeddings()).num_embeddings))
            dim, spread = embeddings.shape[1], float(embeddings.std())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            last = nn.Linear(dim, dim)
            projection = nn.Sequential(nn.Linear(vector_dim, dim), nn.GELU(), last)
        with torch.no_grad():  # to the size of the tokens' own vectors, which the model can read
            sample = torch.randn(1_000, vector_dim, generator=torch.Generator().manual_seed(seed))
            last.weight *= spread / projection(_unit_rows(sample)).std()
            last.bias.zero_()
        self.projection = projection.to(backbone.device)
        self.log_scale = nn.Parameter(torch.tensor(_INITIAL_SCALE, device=backbone.device).log())

    def step_logits(
        self,
        queries: Sequence[str],
        vectors: Float32[np.ndarray, "lists passages dim"],
        orders: Sequence[Sequence[int]],
        texts: Sequence[Sequence[str]] | None = None,
    ) -> Float[Tensor, "lists steps passages"]:
        """Logits of each step, after the passages before it in the given orders [lists, steps] were read.

        With ``texts``, the first tokens of each passage's text are read after its vector.
        """
        queries = texts_of(queries, "queries")
        passages = self._project(vectors)
        listed = [()] * len(queries) if texts is None else texts
        starts = [self._start(*read) for read in zip(queries, passages, listed, strict=True)]
        rows = [
            torch.cat([start, tokens[[*order[:-1]]]])
            for start, tokens, order in zip(starts, passages, orders, strict=True)
        ]
        # Padding comes last, and no token attends to later ones, so no mask is needed.
        states = self._states(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        last = [states[row, len(token_ids) - len(orders[0]) : len(token_ids)] for row, token_ids in enumerate(rows)]
        return self._logits(torch.stack(last), passages)

    def repetition_loss(
        self,
        texts: Sequence[str],
        vectors: Float32[np.ndarray, "texts dim"],
        head: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, ""]:
        """How surprised the model is by each text's first tokens after its vector: nats, the mean over tokens.

        L = -1/T sum_i log P(t_i | "Passage:", e, " means the same as:", t_1, ..., t_(i-1))

        The alignment stage of PE-Rank, section 3.2.1. ``head`` gives the logits [n, vocabulary] of states [n, dim].
        """
        texts = texts_of(texts, "texts")
        before, after = map(self._ids, ("Passage:", " means the same as:"))
        ids = [self._text_ids(text) for text in texts]
        passages = self._project(vectors)[:, None]
        rows = [
            torch.cat([self._tokens(before), passage, self._tokens([*after, *repeated])])
            for passage, repeated in zip(passages, ids, strict=True)
        ]
        states = self._states(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        first = len(before) + len(after)  # the last place before the text
        predicting = [states[row, first : first + len(repeated)] for row, repeated in enumerate(ids)]
        targets = torch.tensor([token for repeated in ids for token in repeated], device=states.device)
        return nn.functional.cross_entropy(head(torch.cat(predicting)), targets)

    def rank(self, queries: Sequence[str], vectors: Sequence[Float32[np.ndarray, "_ dim"]]) -> list[ReadOrder]:
        """Rank the passages of each query, given by their vectors [n, dim], n of each query; of equal ones the first.

        Raises:
            MismatchError: the vectors are not ``vector_dim`` wide.
            InputError: there are more passages than the model can read.
        """
        queries = texts_of(queries, "queries")
        for matrix in vectors:
            if matrix.shape[1] != self.vector_dim:
                raise MismatchError(
                    f"the passages' vectors have {matrix.shape[1]} dimensions, but this reader reads "
                    f"{self.vector_dim}; tune one for this index"
                )
        by_shape: dict[tuple[int, int], list[int]] = {}
        results = [ReadOrder(np.zeros(0, np.float32), np.zeros(0, np.int64))] * len(queries)
        for index, (query, matrix) in enumerate(zip(queries, vectors, strict=True)):
            if len(matrix):
                by_shape.setdefault((sum(map(len, self._prompt(query))), len(matrix)), []).append(index)
        room = tokens_to_read(self.backbone.device, size_of_states(self.backbone.model))
        for (num_tokens, num_passages), positions in by_shape.items():
            self._require_room(num_tokens + num_passages + min(self.steps, num_passages) - 1)
            size = max(1, room // (num_tokens + num_passages))
            for start in range(0, len(positions), size):
                batch = positions[start : start + size]
                stacked = np.stack([vectors[index] for index in batch])
                for index, read in zip(batch, self._draw([queries[index] for index in batch], stacked), strict=True):
                    results[index] = read
        return results

    def _draw(self, queries: Sequence[str], vectors: Float32[np.ndarray, "lists passages dim"]) -> list[ReadOrder]:
        """``rank`` for prompts of one length."""
        with inference(self):
            # Threads may compute equal rows differently in the last bit: each distinct vector is computed once.
            distinct = torch.from_numpy(np.stack([_first_equals(matrix) for matrix in vectors])).to(
                self.backbone.device
            )
            lists = torch.arange(len(queries), device=distinct.device)[:, None]
            passages = self._project(vectors)[lists, distinct]
            inputs = torch.stack([self._start(query, tokens) for query, tokens in zip(queries, passages, strict=True)])
            cache, rows = DynamicCache(), lists[:, 0]
            is_drawn = torch.zeros(passages.shape[:2], dtype=torch.bool, device=passages.device)
            drawn: list[Tensor] = []
            first = torch.zeros(0)
            for step in range(min(self.steps, passages.shape[1])):
                logits = self._logits(self._states(inputs, cache)[:, -1:], passages)[:, 0][lists, distinct]
                first = first if step else logits
                drawn.append(logits.masked_fill(is_drawn, -torch.inf).argmax(dim=1))
                is_drawn[rows, drawn[-1]] = True
                inputs = passages[rows, drawn[-1]][:, None]
            orders: list[list[int]] = torch.stack(drawn, dim=1).tolist()
        others = [[index for index in range(vectors.shape[1]) if index not in order] for order in orders]
        return [
            ReadOrder(logits, np.array(order + rest, np.int64))
            for logits, order, rest in zip(first.cpu().numpy(), orders, others, strict=True)
        ]

    def require_student(self, fingerprint: str) -> None:
        """Raise a ``MismatchError`` unless this reader reads the vectors of the student with this fingerprint."""
        if fingerprint != self.student:
            raise MismatchError(
                f"this reader reads vectors of the student {name_student(self.student)}, but the index was made by "
                f"{name_student(fingerprint)}; tune a reader for that student, or search an index of its own"
            )

    @property
    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the network, and the scale of the logits."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith("backbone.")}

    def save(self, folder: str | Path, content: Mapping[str, Any] | None = None) -> str:
        """Write the reader as a folder, atomically; returns its fingerprint.

        The language model itself is not in it, only its name and its adapter. ``content`` are additional fields of the
        manifest (data, figures).

        Raises:
            InputError: ``folder`` holds something else than a reader.
        """
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.own_parameters.items()}
        weights = save(tensors | self.backbone.tuned_state())
        identity = {
            "backbone": self.backbone.config.model_dump(mode="json"),
            "base_fingerprint": self.backbone.fingerprint_base(),
            "student": self.student,
            "vector_dim": self.vector_dim,
            "steps": self.steps,
        }
        named = {**identity, "backbone": self.backbone.num_layers}
        fingerprint = fingerprint_json([named, hashlib.sha256(weights).hexdigest()])
        with new_folder(Path(folder), kind=READER_KIND) as temporary:
            write_bytes(temporary / _FILE, weights)
            manifest = {**(content or {}), "fingerprint": fingerprint, **identity}
            write_manifest(temporary, READER_KIND, READER_FORMAT_VERSION, manifest)
        return fingerprint

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> ListwiseReader:
        """Load a reader, by default on the fastest device and in the fastest number format of this machine.

        Raises:
            DataFormatError: ``folder`` is not that of a reader, or its manifest is damaged.
            ModelNotFoundError: its language model is not here.
            MismatchError: the language model has other weights than it was tuned on.
            ModelError: its weights cannot be read, or do not fit.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, READER_KIND, READER_FORMAT_VERSION)
        try:
            config = BackboneConfig.model_validate(manifest["backbone"])
            base, student = str(manifest["base_fingerprint"]), str(manifest["student"])
            vector_dim, steps = int(manifest["vector_dim"]), int(manifest["steps"])
        except (LookupError, TypeError, ValueError) as error:
            problem = " ".join(str(error).split())
            raise DataFormatError(folder / MANIFEST, f"cannot be read as a reader ({problem}); {_RESTORE}") from error
        state = load_tensors(folder / _FILE, remedy=_RESTORE)
        backbone = Backbone.load(config, device=device, dtype=dtype)
        if (here := backbone.fingerprint_base()) != base:
            raise MismatchError(
                f"{folder}: the reader was tuned on weights {base} of '{config.model}', but here that name resolves "
                f"to {here}; use the same weights"
            )
        reader = cls(backbone, vector_dim, student, steps=steps)
        try:
            with torch.no_grad():
                for name, parameter in reader.own_parameters.items():
                    parameter.copy_(state.pop(name))
        except (KeyError, RuntimeError) as error:
            problem = " ".join(str(error).split())
            raise ModelError(f"{folder / _FILE} does not fit its manifest ({problem}); {_RESTORE}") from error
        backbone.load_tuned_state(state, merge=True)
        return reader.eval()

    def _prompt(self, query: str) -> tuple[list[int], list[int]]:
        """Tokens before the passages, and after them."""
        pieces = (f"Query: {query}", "\nPassages:", "\nBest first:")
        first, middle, last = map(self._ids, pieces)
        return [*first[:_QUERY_TOKENS], *middle], last

    def _ids(self, text: str) -> list[int]:
        return cast("list[int]", self.backbone.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text_ids(self, text: str) -> list[int]:
        return self._ids(f" {text}")[:_TEXT_TOKENS]

    def _start(self, query: str, passages: Tensor, texts: Sequence[str] = ()) -> Tensor:
        """What is read before the first step [tokens, dim]; the passages' own vectors [n, dim] are in it."""
        before, after = map(self._tokens, self._prompt(query))
        if texts:
            read = zip(passages.split(1), (self._tokens(self._text_ids(text)) for text in texts), strict=True)
            passages = torch.cat([piece for pieces in read for piece in pieces])
            self._require_room(len(before) + len(passages) + len(after) + self.steps - 1)
        return torch.cat([before, passages, after])

    def _tokens(self, ids: Sequence[int]) -> Tensor:
        return self.backbone.model.get_input_embeddings()(torch.tensor(ids, device=self.backbone.device)).float()

    def _project(self, vectors: NDArray[np.float32]) -> Tensor:
        return self.projection(_unit_rows(torch.from_numpy(vectors).to(self.backbone.device)))

    def _states(self, inputs: Tensor, cache: DynamicCache | None = None) -> Tensor:
        dtype = self.backbone.compute_dtype
        with torch.autocast(self.backbone.device.type, dtype, enabled=dtype != torch.float32):
            output = self.backbone.model(
                inputs_embeds=inputs.to(dtype), past_key_values=cache, use_cache=cache is not None
            )
        return output.last_hidden_state.float()

    def _logits(self, states: Tensor, passages: Tensor) -> Tensor:
        """[lists, steps, passages]: inner products of normalised states with the passages' vectors, as published."""
        return self.log_scale.exp() * nn.functional.normalize(states, dim=-1) @ passages.transpose(1, 2)

    def _require_room(self, num_tokens: int) -> None:
        readable = readable_tokens(self.backbone.model.config)
        if readable is not None and num_tokens > readable:
            raise InputError(
                f"'{self.backbone.config.model}' reads at most {readable} tokens, but query and passages would be "
                f"{num_tokens}; let it read fewer passages"
            )


def _first_equals(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """[n]: for each row, the first row that is equal to it."""
    _, first, inverse = np.unique(vectors, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _unit_rows(vectors: Tensor) -> Tensor:
    """Rows of mean square 1."""
    return nn.functional.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5
