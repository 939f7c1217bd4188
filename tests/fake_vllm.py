"""A stand-in for vLLM's offline engine that runs a tiny model with ``transformers``, for tests of ``VllmTeacher``.

It has the part of vLLM's interface that d2llm uses, with vLLM's own checks and results: the token that is drawn takes
one of the places of the requested log-probabilities, these are of the whole vocabulary before tokens are masked
(``raw_logprobs``), and an adapter is read by PEFT. ``install(monkeypatch)`` makes ``import vllm`` find it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import transformers


@dataclass
class SamplingParams:
    """Fields of vLLM 0.22's class of this name; an unknown one is a TypeError there too."""

    temperature: float = 1.0
    max_tokens: int | None = 16
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    """The log-probability of one token."""

    logprob: float


@dataclass
class CompletionOutput:
    """What was written after a prompt."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None


@dataclass
class RequestOutput:
    """The result of one request."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass(frozen=True)
class LoRARequest:
    """An adapter in a folder."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class LLM:
    """The engine; ``engines`` has those that were started, the latest last."""

    model: str
    tokenizer: str
    load_format: str
    trust_remote_code: bool
    dtype: str
    quantization: str | None
    tensor_parallel_size: int
    gpu_memory_utilization: float
    enforce_eager: bool
    max_model_len: int
    enable_prefix_caching: bool
    logprobs_mode: str
    seed: int
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    requests: list[list[int]] = field(default_factory=list)
    engines: ClassVar[list[LLM]] = []

    def __post_init__(self) -> None:
        if self.tensor_parallel_size > 1:
            raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        assert self.load_format == "safetensors"
        assert not self.trust_remote_code
        assert self.logprobs_mode == "raw_logprobs"
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        if self.max_model_len > self._model.config.max_position_embeddings:
            raise ValueError(f"User-specified max_model_len ({self.max_model_len}) is greater than the derived one")
        self._adapted = False
        self.llm_engine = ModuleType("llm_engine")
        self.llm_engine.engine_core = self
        self.is_shut_down = False
        LLM.engines.append(self)

    def shutdown(self) -> None:
        """End the engine."""
        self.is_shut_down = True

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: SamplingParams,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """One output for each prompt, in their order."""
        assert not use_tqdm
        if lora_request is not None and not self._adapted:
            self._adapt(lora_request)
        return [self._one(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _adapt(self, request: LoRARequest) -> None:
        peft = pytest.importorskip("peft")
        assert self.enable_lora
        assert self.max_lora_rank in (8, 16, 32, 64, 128, 256, 320, 512)
        adapted = peft.PeftModel.from_pretrained(self._model, request.lora_path)
        assert adapted.peft_config["default"].r <= self.max_lora_rank
        assert (Path(request.lora_path) / "adapter_model.safetensors").is_file()
        self._model, self._adapted = adapted.eval(), True

    def _one(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        assert len(ids) < self.max_model_len
        assert (params.max_tokens, params.temperature) == (1, 0.0)
        self.requests.append(ids)
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        log_probabilities = logits.log_softmax(0)
        if params.allowed_token_ids is not None:
            mask = torch.full_like(logits, -torch.inf)
            mask[params.allowed_token_ids] = 0.0
            logits = logits + mask
        drawn = int(logits.argmax())
        chosen = params.logprob_token_ids or log_probabilities.topk(params.logprobs or 1).indices.tolist()
        shown = [drawn, *(token for token in chosen if token != drawn)][: len(chosen)]
        logprobs = {token: Logprob(float(log_probabilities[token])) for token in shown}
        return RequestOutput(list(ids), [CompletionOutput([drawn], [logprobs])])


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Make ``import vllm`` find this module's classes; returns the engine's class."""
    vllm, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vars(vllm).update(LLM=LLM, SamplingParams=SamplingParams, lora=lora, __version__="0.22.0")
    vars(lora).update(request=request)
    vars(request).update(LoRARequest=LoRARequest)
    for module in (vllm, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    LLM.engines.clear()
    return LLM
