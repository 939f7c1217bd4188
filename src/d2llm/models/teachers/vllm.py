"""A causal teacher that vLLM's offline engine runs: the same question and answer words as ``CausalTeacher``.

Each pair is one request for one token. Only the two answer words may be drawn, and the log-probabilities of exactly
these two are requested, so that log-odds = logp(yes) - logp(no) are exact however unlikely the words are. vLLM keeps
the keys and values of what several requests begin with, so the pairs of a query share the work of reading it.

The interface is vLLM's (https://docs.vllm.ai): ``LLM.generate`` with ``TokensPrompt`` and ``SamplingParams``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from d2llm.core.errors import AnswerTokenError, InputError, ModelError
from d2llm.core.extras import require
from d2llm.core.progress import Advance
from d2llm.core.types import Task
from d2llm.models.sources import (
    find_model,
    fingerprint_model,
    first_sentence,
    load_tensors,
    load_tokenizer,
    weights_folder,
)
from d2llm.models.teachers.identity import (
    ADAPTER_FILE,
    config_of,
    find_kind,
    identify_local_teacher,
    read_tuned_teacher,
    require_same_base,
)
from d2llm.models.teachers.pair_teacher import IdentifiedTeacher, TeacherScores, TextPair
from d2llm.models.teachers.questions import Questions
from d2llm.recipe import PromptedTeacherConfig, TeacherIdentity, VllmTeacherConfig

_PAIRS_AT_ONCE = 4096  # between two reports of progress; vLLM itself decides how many it computes together
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM reserves memory


class VllmTeacher(IdentifiedTeacher):
    """A teacher on vLLM. A tuned teacher's adapter is computed beside the weights of its base model."""

    def __init__(self, config: VllmTeacherConfig, *, dtype: str | None = None) -> None:
        """Start the engine with the model that ``config.model`` names, also a tuned teacher's folder.

        Raises:
            MissingExtraError: vLLM is not installed.
            ModelNotFoundError: there are no usable weights.
            ModelError: the model is not a causal language model, or vLLM cannot load or run it.
            MismatchError: the teacher was tuned on weights other than those that its base model's name refers to here.
            AnswerTokenError: an answer word is not one distinct token.
            InputError: there is no such prompt set.
        """
        kind = find_kind(config.as_kind("auto"))
        if kind != "causal":
            raise ModelError(
                f"'{config.model}' is a {kind} model, but vLLM scores with causal language models only; leave the "
                "teacher's kind out"
            )
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would report its use to its makers
        vllm = require("vllm", extra="vllm", purpose="a teacher of kind vllm")
        tuned = read_tuned_teacher(config)
        self.config = cast(PromptedTeacherConfig, config_of(config, tuned))
        location = find_model(self.config.model)
        require_same_base(tuned, fingerprint_model(location), self.config.model)
        self._identity = self.identify(config)
        self._questions = Questions(self.config, load_tokenizer(location))
        adapter: dict[str, Tensor] = (
            load_tensors(tuned.folder / ADAPTER_FILE, remedy="restore the teacher's folder or tune it again")
            if tuned and tuned.base_fingerprint is not None
            else {}
        )
        options = _engine_options(config, location, self.config.max_tokens, dtype or config.dtype)
        self._requests: dict[str, Any] = {"use_tqdm": False}
        if adapter:
            self._folder = tempfile.TemporaryDirectory(prefix="d2llm-adapter-")
            options |= {"enable_lora": True, "max_loras": 1}
            options["max_lora_rank"] = _write_peft_adapter(Path(self._folder.name), adapter, location)
            lora = require("vllm.lora.request", extra="vllm", purpose="a tuned teacher of kind vllm")
            self._requests["lora_request"] = lora.LoRARequest("teacher", 1, self._folder.name)
        try:
            self._engine = vllm.LLM(**options)
        except (ValueError, RuntimeError, OSError, TypeError) as error:
            raise ModelError(
                f"vLLM cannot load '{self.config.model}': {first_sentence(error)}; see its messages above, and "
                "the settings of [teacher] (memory, number of GPUs, quantization)"
            ) from error
        weakref.finalize(self, _shut_down, self._engine)
        self._sampling = {task: self._sampling_of(vllm, ids) for task, ids in self._questions.answer_ids.items()}

    @classmethod
    def load(cls, config: VllmTeacherConfig, *, device: str | None = None, dtype: str | None = None) -> VllmTeacher:
        """Start the engine on as many of the GPUs that this process sees as ``tensor_parallel_size`` says.

        Raises:
            InputError: a certain GPU is named.
        """
        if device is not None and ":" in device:
            gpu = device.partition(":")[2]
            raise InputError(
                f"vLLM takes the GPUs that the process sees, so it cannot be put on {device}; set "
                f"CUDA_VISIBLE_DEVICES={gpu} instead"
            )
        return cls(config, dtype=dtype)

    @staticmethod
    def identify(config: VllmTeacherConfig) -> TeacherIdentity:
        """The identity of ``load(config)``: that of the same causal teacher, unless vLLM quantises its weights."""
        return identify_local_teacher(config)

    def score_pairs(
        self, pairs: Sequence[TextPair], task: Task, *, with_features: bool = False, advance: Advance | None = None
    ) -> TeacherScores:
        """Score pairs (``PairTeacher.score_pairs``). ``features`` is None, because the engine returns no states.

        Raises:
            AnswerTokenError: the engine did not return the log-probabilities of both answer words.
            ModelError: the engine read other tokens than it was sent.
        """
        inputs, num_truncated = self._questions.inputs(pairs, task)
        order: dict[tuple[int, ...], list[int]] = {}  # pairs of the same query follow each other
        for index, (prefix, _) in enumerate(inputs):
            order.setdefault(prefix, []).append(index)
        indices = [index for group in order.values() for index in group]
        log_odds = np.empty(len(pairs), dtype=np.float32)
        for start in range(0, len(indices), _PAIRS_AT_ONCE):
            chosen = indices[start : start + _PAIRS_AT_ONCE]
            prompts = [{"prompt_token_ids": [*inputs[index][0], *inputs[index][1]]} for index in chosen]
            outputs = self._engine.generate(prompts, self._sampling[task], **self._requests)
            for index, prompt, output in zip(chosen, prompts, outputs, strict=True):
                if list(output.prompt_token_ids) != prompt["prompt_token_ids"]:
                    raise ModelError(
                        f"vLLM read {len(output.prompt_token_ids)} tokens of query {pairs[index][0][:60]!r} instead of "
                        f"the {len(prompt['prompt_token_ids'])} that it was sent; use another version of vLLM"
                    )
                log_odds[index] = self._log_odds(output, task)
            if advance is not None:
                advance(len(chosen))
        return TeacherScores(log_odds, None, num_truncated, sum(len(prefix) + len(rest) for prefix, rest in inputs))

    def _sampling_of(self, vllm: Any, answer_ids: tuple[int, int]) -> Any:
        # The token that is drawn takes one of the places, so it has to be one of the two.
        ids = list(answer_ids)
        try:
            return vllm.SamplingParams(
                max_tokens=1,
                temperature=0.0,
                logprobs=len(ids),
                logprob_token_ids=ids,
                allowed_token_ids=ids,
                detokenize=False,
            )
        except TypeError as error:
            raise ModelError(
                f"this version of vLLM ({getattr(vllm, '__version__', 'unknown')}) cannot return the log-probabilities "
                f"of given tokens ({first_sentence(error)}): pip install --upgrade 'd2llm[vllm]'"
            ) from error

    def _log_odds(self, output: Any, task: Task) -> float:
        """logp(yes) - logp(no) of the first token of an output."""
        positions = output.outputs[0].logprobs if output.outputs else None
        returned: dict[int, float] = {}
        if positions:
            returned = {token: float(value.logprob) for token, value in positions[0].items()}
        values = [returned.get(token, math.nan) for token in self._questions.answer_ids[task]]
        if not all(math.isfinite(value) for value in values):
            prompt = self._questions.prompts[task]
            raise AnswerTokenError(
                f"vLLM did not return the log-probabilities of both {prompt.yes!r} and {prompt.no!r} of teacher "
                f"'{self.config.model}', but {returned}; use another version of vLLM, or leave the teacher's kind out"
            )
        return values[0] - values[1]


def _engine_options(settings: VllmTeacherConfig, location: str, max_tokens: int, dtype: str | None) -> dict[str, Any]:
    """The arguments of ``vllm.LLM``."""
    # Only safetensors are fetched, so that the engine cannot fall back to pickled weights.
    return {
        "model": str(weights_folder(location)),
        "tokenizer": location,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "dtype": dtype or "auto",
        "quantization": settings.quantization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager,
        "max_model_len": max_tokens + 1,  # and the answer
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
        "seed": 0,
    }


def _write_peft_adapter(folder: Path, adapter: dict[str, Tensor], location: str) -> int:
    """Write an adapter of d2llm in PEFT's format, which vLLM reads; returns the rank to reserve memory for.

    Adapters of different ranks are padded with zeros to the largest.

    Raises:
        ModelError: vLLM has no adapters of this rank.
    """
    rank = max(tensor.shape[0] for name, tensor in adapter.items() if name.endswith(".lora_down"))
    reserved = next((supported for supported in _LORA_RANKS if supported >= rank), None)
    if reserved is None:
        raise ModelError(f"the teacher's adapter has rank {rank}, but vLLM takes at most {_LORA_RANKS[-1]}")
    part = _base_prefix(location)
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        layer, _, side = name.rpartition(".")
        is_down = side == "lora_down"
        missing = rank - tensor.shape[0 if is_down else 1]
        padded = functional.pad(tensor, (0, 0, 0, missing) if is_down else (0, missing))
        tensors[f"base_model.model.{part}{layer}.lora_{'A' if is_down else 'B'}.weight"] = padded.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,  # the factor is part of lora_up
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": location,
        "target_modules": sorted({name.rpartition(".")[0].rpartition(".")[2] for name in adapter}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return reserved


def _base_prefix(location: str) -> str:
    """What comes before the names of layers in the whole causal model, such as ``model.``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]  # pyright: ignore[reportPrivateUsage]
    return f"{model_class.base_model_prefix}." if model_class.base_model_prefix else ""


def _shut_down(engine: Any) -> None:
    """End the engine's process at once, so that its memory is free for what comes next."""
    core = getattr(getattr(engine, "llm_engine", None), "engine_core", None)
    if core is not None:
        core.shutdown()
