"""The local writer: a causal LLM that follows a prompt, or one that was tuned to write queries.

An untuned model gets a prompt (``models.writers.prompts``) and writes all queries of an assignment at once, one on a
line. A tuned one (``training.tune_writer``) has a format of its own, without a chat template: passage, kind, query. It
writes each query of an assignment apart.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from d2llm.core.errors import DataFormatError, InputError, MismatchError
from d2llm.core.fingerprint import fingerprint_files, fingerprint_json
from d2llm.core.manifest import FILE_NAME, read_manifest, write_manifest
from d2llm.core.progress import Advance
from d2llm.models.device import choose_device, choose_dtype, inference, use_plain_attention_on_cpu
from d2llm.models.downloads import find_saved
from d2llm.models.length_limit import TextLengths, readable_tokens
from d2llm.models.lora import adapter_state, attach_lora, join_adapters, merge_adapter, train_adapters_only
from d2llm.models.sources import (
    find_model,
    fingerprint_model,
    leading_special_ids,
    load_pretrained,
    load_tensors,
    load_tokenizer,
)
from d2llm.models.writers.answers import describe_problem, parse_answer
from d2llm.models.writers.prompts import WriterPrompts, as_data, cut_assignments
from d2llm.models.writers.writer import DEFAULT_TEMPERATURE, EXPANSION_KINDS, Assignment, WrittenQueries
from d2llm.ops.batching import pad_left, token_budget_batches
from d2llm.recipe import LocalWriterConfig, LoraConfig

_log = logging.getLogger(__name__)

WRITER_KIND = "writer"
WRITER_FORMAT_VERSION = 1
_ADAPTER_FILE = "adapter.safetensors"
_BATCH_TOKENS, _BATCH_ROWS = 16_384, 32
_ON_ACCELERATORS = 4  # times as many: a step takes no longer with more rows
_USUALLY_ENOUGH = 256  # tokens: their probability nearly always exceeds top_p, which saves sorting the vocabulary


@dataclass(frozen=True, slots=True)
class _Row:
    """One text to continue, for the assignment with this index; ``draws`` are its random numbers."""

    assignment: int
    token_ids: list[int]
    max_new_tokens: int
    draws: random.Random


@dataclass(frozen=True, slots=True)
class _Continuation:
    """What the model wrote after a row: token ids with the one that ends it, if it came to an end."""

    token_ids: list[int]
    is_complete: bool


@dataclass(frozen=True, slots=True)
class TunedWriter:
    """The content of a tuned writer's manifest; ``base_fingerprint`` is that of the weights its adapter belongs to."""

    folder: Path
    model: str
    max_passage_tokens: int
    fingerprint: str
    base_fingerprint: str


def read_tuned_writer(model: str) -> TunedWriter | None:
    """The tuned or shipped writer that ``model`` names, or None if it names something else.

    Raises:
        DataFormatError: the folder's manifest cannot be read, or is not that of a writer.
    """
    folder = find_saved(model, "writers")
    if folder is None:
        return None
    manifest = read_manifest(folder, WRITER_KIND, WRITER_FORMAT_VERSION)
    try:
        return TunedWriter(
            folder,
            str(manifest["model"]),
            int(manifest["max_passage_tokens"]),
            str(manifest["fingerprint"]),
            str(manifest["base_fingerprint"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise DataFormatError(
            folder / FILE_NAME, f"cannot be read as a writer ({error}); restore the folder"
        ) from error


def tuned_prompt(assignment: Assignment) -> str:
    """The text that a tuned writer continues with a query: the passage with its title, and the kind of the query."""
    text = f"{assignment.title}\n{assignment.passage}" if assignment.title else assignment.passage
    return f"{as_data(text)}\n\n{assignment.kind}:"


def tuned_target(query: str) -> str:
    """The continuation of ``tuned_prompt`` that a tuned writer learns; the token that ends a text follows it."""
    return " " + " ".join(query.split())


class LocalWriter:
    """A writer with local weights.

    The random numbers of an assignment follow from its seed, kind and passage alone. Its queries therefore do not
    depend on the assignments beside it, except through rounding: another batch is padded to another length, which
    changes probabilities in their last digits, and now and then tips a draw (more often in bfloat16 than in float32).
    The same call on the same machine gives the same queries.
    """

    def __init__(self, config: LocalWriterConfig, *, device: torch.device, compute_dtype: torch.dtype) -> None:
        """Load what ``config.model`` names: pretrained weights, a folder that ``save`` wrote, or a shipped writer.

        Raises:
            ModelNotFoundError: there are no usable weights.
            ModelError: the model is of another kind, or the adapter cannot be read.
            MismatchError: the writer was tuned on weights other than those that its base model's name refers to here.
            InputError: there is no such prompt set, or ``max_passage_tokens`` is more than the model can read.
        """
        from transformers import AutoModelForCausalLM

        self.tuned = read_tuned_writer(config.model)
        self.config = config if self.tuned is None else _config_of(self.tuned, config)
        self.location = find_model(self.config.model)
        self.base_fingerprint = fingerprint_model(self.location)
        if self.tuned is not None and self.tuned.base_fingerprint != self.base_fingerprint:
            raise MismatchError(
                f"{self.tuned.folder}: the writer was tuned on weights {self.tuned.base_fingerprint} of "
                f"'{self.config.model}', but here that name resolves to {self.base_fingerprint}; use the same weights"
            )
        self.weights_fingerprint = self.base_fingerprint if self.tuned is None else self.tuned.fingerprint
        self.compute_dtype = compute_dtype
        self.tokenizer: Any = load_tokenizer(self.location)
        self.prompts = WriterPrompts(config.prompt)
        whole: Any = load_pretrained(AutoModelForCausalLM, self.location, dtype=compute_dtype)
        self.whole: Any = whole.to(device).eval().requires_grad_(False)
        whole.get_output_embeddings().register_forward_pre_hook(_make_contiguous)
        self.model = cast(nn.Module, whole.base_model)
        self._merged_adapter: dict[str, Tensor] = {}
        if self.tuned is not None:
            remedy = "restore the writer's folder or tune it again"
            self._merged_adapter = load_tensors(self.tuned.folder / _ADAPTER_FILE, remedy=remedy)
            merge_adapter(self.model, self._merged_adapter)
        self._special_ids = leading_special_ids(self.tokenizer)
        self._end_ids = _end_ids(self.tokenizer, whole)
        self._lengths = TextLengths(self.tokenizer)
        self._lora: LoraConfig | None = None
        self._takes_positions = "position_ids" in inspect.signature(whole.forward).parameters
        self._warned = False
        self._require_room(self.config.max_passage_tokens, self.config.max_new_tokens)

    @classmethod
    def load(
        cls,
        config: LocalWriterConfig,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> LocalWriter:
        """Load a writer, by default on the fastest device here and in the number format that is fastest on it."""
        chosen = choose_device(device)
        return cls(config, device=chosen, compute_dtype=choose_dtype(chosen, dtype))

    @property
    def temperature(self) -> float:
        """The temperature of its sampling."""
        if self.config.temperature is not None:
            return self.config.temperature
        return 0.0 if self.tuned is None else DEFAULT_TEMPERATURE

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.model.parameters()).device

    @property
    def fingerprint(self) -> str:
        """Identity of everything that affects what is written, except rounding."""
        config = self.config
        prompts = ["tuned"] if self.tuned else self.prompts.fingerprints
        sampling = [config.max_new_tokens, self.temperature, config.top_p]
        return fingerprint_json(["local", self.weights_fingerprint, prompts, config.max_passage_tokens, sampling])

    def write(self, assignments: Sequence[Assignment], *, advance: Advance | None = None) -> list[WrittenQueries]:
        """Carry assignments out, in batches of prompts of similar length; arguments and result as for ``Writer.write``.

        A tuned writer does not use the examples of an assignment, because its format has none.

        Raises:
            InputError: a prompt with its examples is longer than the model can read, or a tuned writer is to expand a
                query.
        """
        if self.tuned is not None and any(assignment.kind in EXPANSION_KINDS for assignment in assignments):
            raise InputError(
                f"{self.tuned.folder}: this writer was tuned to write queries for passages and cannot expand or "
                f"rewrite queries; use an untuned one, such as '{self.config.model}'"
            )
        kept, cut = cut_assignments(assignments, self._lengths, max_tokens=self.config.max_passage_tokens)
        if self.tuned is not None:
            self._warn_of_examples(kept)
        rows = self._rows(kept)
        continuations: dict[int, _Continuation] = {}
        num_left = [0] * len(kept)
        for row in rows:
            num_left[row.assignment] += 1
        lengths = [len(row.token_ids) + row.max_new_tokens for row in rows]
        times = 1 if self.device.type == "cpu" else _ON_ACCELERATORS
        for batch in token_budget_batches(lengths, max_tokens=times * _BATCH_TOKENS, max_items=times * _BATCH_ROWS):
            continuations |= zip(batch, self._continue([rows[index] for index in batch]), strict=True)
            for index in batch:
                num_left[rows[index].assignment] -= 1
                if advance is not None and num_left[rows[index].assignment] == 0:
                    advance(1)
        by_assignment: list[list[int]] = [[] for _ in kept]
        for index, row in enumerate(rows):
            by_assignment[row.assignment].append(index)
        return [
            self._result(assignment, [rows[n] for n in numbers], [continuations[n] for n in numbers], was_cut)
            for assignment, numbers, was_cut in zip(kept, by_assignment, cut, strict=True)
        ]

    def encode_tuned(self, assignments: Sequence[Assignment]) -> tuple[list[list[int]], list[bool]]:
        """Token ids of ``tuned_prompt`` with the passage cut to its limit, and whether it was cut."""
        kept, cut = cut_assignments(assignments, self._lengths, max_tokens=self.config.max_passage_tokens)
        return self._tuned_ids(kept), cut

    def encode_targets(self, queries: Sequence[str]) -> list[list[int]]:
        """Token ids of ``tuned_target``, with the token that ends a text."""
        return [[*ids, self._end_ids[0]] for ids in self._ids([tuned_target(query) for query in queries])]

    def query_losses(self, prompts: Sequence[list[int]], targets: Sequence[list[int]]) -> Float[Tensor, " targets"]:
        """Sums of the next-token cross-entropy, in nats, of each target's tokens after its prompt; float32."""
        rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
        token_ids, mask = pad_left(rows, self._padding, self.device)
        longest = max(map(len, targets))
        with self._number_format():
            # With left padding, all targets are at the end, and no other position needs logits.
            output = self.whole(
                input_ids=token_ids,
                attention_mask=mask.long(),
                use_cache=False,
                logits_to_keep=longest + 1,
                **self._positions(mask),
            )
        labels = token_ids[:, -longest:].clone()
        for row, target in enumerate(targets):
            labels[row, : longest - len(target)] = -100  # not a part of the target
        logits = output.logits[:, -longest - 1 : -1].float()
        return nn.functional.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none").sum(dim=1)

    def prepare_training(self, lora: LoraConfig, *, seed: int = 0) -> None:
        """Attach trainable adapters, while everything else stays frozen."""
        self._lora = lora
        attach_lora(self.model, lora, seed=seed)
        use_plain_attention_on_cpu(self.whole)

    def train(self, mode: bool = True) -> None:
        """Switch the adapters' dropout on or off; frozen layers always run without it."""
        train_adapters_only(self.model, mode)

    def save(self, folder: Path, content: Mapping[str, Any]) -> str:
        """Write the adapter in float16, and a manifest with ``content``; returns the tuned weights' fingerprint.

        ``WriterConfig(model=str(folder))`` loads it again.
        """
        state = join_adapters(self._merged_adapter, adapter_state(self.model))
        save_file({name: tensor.half() for name, tensor in state.items()}, folder / _ADAPTER_FILE)
        fingerprint = fingerprint_json([self.base_fingerprint, fingerprint_files([folder / _ADAPTER_FILE])])
        identity = {
            "fingerprint": fingerprint,
            "base_fingerprint": self.base_fingerprint,
            "model": self.config.model,
            "max_passage_tokens": self.config.max_passage_tokens,
            "lora": self._lora.model_dump() if self._lora else None,
        }
        write_manifest(folder, WRITER_KIND, WRITER_FORMAT_VERSION, {**content, **identity})
        return fingerprint

    def _rows(self, assignments: Sequence[Assignment]) -> list[_Row]:
        """The texts to continue: one for each query if the writer is tuned, else one for each assignment."""
        prompts = self._prompt_ids(assignments) if self.tuned is None else self._tuned_ids(assignments)
        rows: list[_Row] = []
        for index, (assignment, token_ids) in enumerate(zip(assignments, prompts, strict=True)):
            num_apart, num_lengths = (1, assignment.num_lengths) if self.tuned is None else (assignment.num_queries, 1)
            limit = self.config.max_new_tokens * num_lengths
            self._require_room(len(token_ids), limit)
            seed = f"{assignment.seed}:{assignment.kind}:{assignment.passage}"
            rows += [_Row(index, token_ids, limit, random.Random(f"{copy}:{seed}")) for copy in range(num_apart)]
        return rows

    def _tuned_ids(self, assignments: Sequence[Assignment]) -> list[list[int]]:
        return [[*self._special_ids, *ids] for ids in self._ids([tuned_prompt(item) for item in assignments])]

    def _prompt_ids(self, assignments: Sequence[Assignment]) -> list[list[int]]:
        """Token ids of the prompts, each as a user's message if the model has a chat template."""
        prompts = [self.prompts[assignment.kind].fill(assignment) for assignment in assignments]
        if not self.tokenizer.chat_template:
            return [[*self._special_ids, *ids] for ids in self._ids([f"{prompt}\n\n" for prompt in prompts])]
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        return self._ids([self.tokenizer.apply_chat_template(message, **options) for message in messages])

    def _continue(self, rows: Sequence[_Row]) -> list[_Continuation]:
        """What the model writes after each row."""
        from transformers import GenerationConfig, LogitsProcessorList

        token_ids, mask = pad_left([row.token_ids for row in rows], self._padding, self.device)
        settings = GenerationConfig(
            do_sample=False,  # the sampler leaves one token to choose from
            num_beams=1,
            max_new_tokens=max(row.max_new_tokens for row in rows),
            eos_token_id=self._end_ids,
            pad_token_id=self._padding,
        )
        sampler = _Sampler([row.draws for row in rows], temperature=self.temperature, top_p=self.config.top_p)
        processors = LogitsProcessorList([cast(Any, sampler)] if self.temperature > 0 else [])
        with inference(self.whole), self._number_format():
            output = self.whole.generate(
                input_ids=token_ids,
                attention_mask=mask.long(),
                past_key_values=self._read_once(rows),
                generation_config=settings,
                logits_processor=processors,
            )
        written = cast("list[list[int]]", output[:, token_ids.shape[1] :].tolist())
        return [self._continuation(token_ids, row.max_new_tokens) for token_ids, row in zip(written, rows, strict=True)]

    def _read_once(self, rows: Sequence[_Row]) -> Any:
        """The keys and values of the rows' prompts, but for each last token; a prompt of several rows is read once.

        None if all prompts differ, or are of one token.
        """
        from transformers import DynamicCache

        prompts: dict[tuple[int, ...], int] = {}
        prompt_rows = [prompts.setdefault(tuple(row.token_ids), len(prompts)) for row in rows]
        if len(prompts) == len(rows) or max(map(len, prompts)) == 1:
            return None
        token_ids, mask = pad_left([list(prompt) for prompt in prompts], self._padding, self.device)
        token_ids, mask = token_ids[:, :-1], mask[:, :-1]
        cache = self.model(
            input_ids=token_ids, attention_mask=mask.long(), use_cache=True, **self._positions(mask)
        ).past_key_values
        if not isinstance(cache, DynamicCache):
            return None
        cache.batch_select_indices(torch.tensor(prompt_rows, device=self.device))
        return cache

    def _continuation(self, token_ids: list[int], limit: int) -> _Continuation:
        for length, token_id in enumerate(token_ids[:limit], start=1):
            if token_id in self._end_ids:
                return _Continuation(token_ids[:length], True)
        return _Continuation(token_ids[:limit], False)

    def _result(
        self, assignment: Assignment, rows: Sequence[_Row], written: Sequence[_Continuation], was_cut: bool
    ) -> WrittenQueries:
        """The queries in what was written for one assignment."""
        queries: dict[str, None] = {}
        num_dropped = 0
        problem = None
        is_tuned, is_passage = self.tuned is not None, assignment.kind == "answer"
        for continuation in written:
            text: str = self.tokenizer.decode(continuation.token_ids, skip_special_tokens=True)
            parsed, num_unusable = parse_answer(
                text,
                prompt="" if is_tuned else self.prompts[assignment.kind].known_text(assignment),
                num_queries=1 if is_tuned else assignment.num_queries,
                is_complete=continuation.is_complete,
                is_passage=is_passage,
            )
            num_dropped += num_unusable + sum(query in queries for query in parsed)
            queries |= dict.fromkeys(parsed)
            if not parsed and problem is None:
                problem = describe_problem(text, is_complete=continuation.is_complete, is_passage=is_passage)
        return WrittenQueries(
            tuple(queries),
            sum(len(row.token_ids) for row in rows),
            sum(len(continuation.token_ids) for continuation in written),
            num_dropped=num_dropped,
            truncated=was_cut,
            problem=None if queries else problem,
        )

    def _positions(self, mask: Bool[Tensor, "rows tokens"]) -> dict[str, Tensor]:
        """The positions of left-padded tokens, as an argument of the model; nothing if it takes none."""
        return {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)} if self._takes_positions else {}

    def _require_room(self, num_prompt_tokens: int, num_new_tokens: int) -> None:
        readable = readable_tokens(self.whole.config.get_text_config())
        if readable is not None and num_prompt_tokens + num_new_tokens > readable:
            raise InputError(
                f"'{self.config.model}' reads and writes at most {readable} tokens, but here it would be "
                f"{num_prompt_tokens} and {num_new_tokens}; lower max_passage_tokens or max_new_tokens, or use fewer "
                "examples or queries for each assignment"
            )

    def _warn_of_examples(self, assignments: Sequence[Assignment]) -> None:
        if not self._warned and any(assignment.examples for assignment in assignments):
            self._warned = True
            _log.warning("'%s' is a tuned writer, which does not use examples", self.config.model)

    @property
    def _padding(self) -> int:
        return cast(int, self.tokenizer.pad_token_id or 0)

    def _number_format(self) -> torch.autocast:
        """Autocast, enabled only if trained float32 weights are mixed with weights in a smaller format."""
        mixed = self.compute_dtype != torch.float32 and self._lora is not None
        return torch.autocast(self.device.type, self.compute_dtype, enabled=mixed)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
        return cast("list[list[int]]", encoded["input_ids"])


class _Sampler:
    """A logits processor that samples: for each row it leaves only the token that the row's own draws choose.

    The tokens of a row are sorted by probability, and one number between 0 and 1 chooses among the likeliest that
    together have the probability ``top_p``. In ``generate`` itself, all rows draw from one generator, so that a row's
    text would depend on the rows beside it.
    """

    def __init__(self, draws: Sequence[random.Random], *, temperature: float, top_p: float) -> None:
        self._draws, self._temperature, self._top_p = draws, temperature, top_p

    def __call__(
        self, input_ids: Int[Tensor, "rows tokens"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        del input_ids
        logits = scores.float() / self._temperature
        total = logits.logsumexp(1, keepdim=True)
        values, tokens = logits.topk(min(_USUALLY_ENOUGH, logits.shape[1]), dim=1)
        cumulative = (values - total).exp().cumsum(1)
        if bool((cumulative[:, -1] < self._top_p).any()):
            values, tokens = logits.sort(dim=1, descending=True)
            cumulative = (values - total).exp().cumsum(1)
        last = (cumulative < self._top_p).sum(1, keepdim=True).clamp(max=cumulative.shape[1] - 1)
        draws = torch.tensor([[row.random()] for row in self._draws], dtype=torch.float32, device=scores.device)
        rank = (cumulative <= draws * cumulative.gather(1, last)).sum(1, keepdim=True).minimum(last)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, rank), 0.0)


def _config_of(tuned: TunedWriter, config: LocalWriterConfig) -> LocalWriterConfig:
    """The settings of a tuned writer: its own model and length limit, and the sampling that ``config`` asks for."""
    if "max_passage_tokens" in config.model_fields_set and config.max_passage_tokens != tuned.max_passage_tokens:
        _log.warning(
            "%s was tuned with max_passage_tokens %d, which is used instead of %d",
            *(tuned.folder, tuned.max_passage_tokens, config.max_passage_tokens),
        )
    return config.model_copy(update={"model": tuned.model, "max_passage_tokens": tuned.max_passage_tokens})


def _make_contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy the states of a few positions before they are multiplied by the vocabulary's weights.

    For a slice of a larger tensor, torch on a CPU copies these weights for each row, which takes 200 times as long.
    """
    del module
    return tuple(states.contiguous() for states in inputs)


def _end_ids(tokenizer: Any, model: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's first, then those that the model names.

    Raises:
        InputError: there is none.
    """
    declared = getattr(model.generation_config, "eos_token_id", None)
    listed = cast("list[int]", declared) if isinstance(declared, list) else [declared]
    ids = dict.fromkeys(token_id for token_id in (tokenizer.eos_token_id, *listed) if token_id is not None)
    if not ids:
        raise InputError("the model has no token that ends a text, so it cannot be a writer; use another model")
    return list(ids)
