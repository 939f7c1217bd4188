"""Tiny random models of real architectures with a small real tokenizer, written in milliseconds.

``write_tiny_model(folder, "llama")`` writes a folder that `transformers`, `Student.create` and `CausalTeacher.load` can
load like any pretrained model. Weights are far larger than a fresh model's, so that texts give clearly different
outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, InteractionConfig, Lora, Pooling, StudentConfig, TeacherConfig

DIM = 32
MAX_TOKENS = 512
TEXTS = [
    "the cat sat on the mat and slept in the sun",
    "a dog runs fast across the green field",
    "rain falls on the roof of the old house",
    "bread is baked from flour, water and salt",
    "ships sail over the sea to far ports",
    "she reads a book about stars and planets",
    "the train leaves the station at noon",
    "snow covers the high mountains all winter",
]
"""Texts whose words are in the tokenizer's training data."""

_BASE = {
    "vocab_size": 400,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_TOKENS,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", _GROUPED | {"sliding_window": None}),
    "gemma": ("GemmaForCausalLM", _GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", _GROUPED | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 64}),
    "phi": ("PhiForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "granite": ("GraniteForCausalLM", _GROUPED | {"logits_scaling": 4.0}),
    "cohere": ("CohereForCausalLM", _GROUPED | {"logit_scale": 0.25}),
}
_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {}),
    "modernbert": ("ModernBertModel", {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 16}),
    "t5": ("T5EncoderModel", {"d_kv": 8, "d_ff": 48, "num_hidden_layers": 3}),
    "xlm_roberta": ("XLMRobertaModel", {"max_position_embeddings": MAX_TOKENS + 1}),
}
DECODERS = tuple(_DECODERS)
ENCODERS = tuple(_ENCODERS)
ARCHITECTURES = DECODERS + ENCODERS


def write_tiny_model(folder: Path, architecture: str = "llama", *, seed: int = 0, **settings: Any) -> Path:
    """Write a random model with its tokenizer to ``folder``; decoders have their language-model head."""
    class_name, own = (_DECODERS | _ENCODERS)[architecture]
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**(_BASE | own | settings)))
        head = model.get_output_embeddings() if architecture in _DECODERS else None
        if head is not None and head.bias is not None:
            torch.nn.init.normal_(head.bias)
    model.save_pretrained(folder)
    tiny_tokenizer(is_decoder=architecture in _DECODERS).save_pretrained(folder)
    return folder


def tiny_tokenizer(*, is_decoder: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of fewer than 400 tokens, `` yes`` and `` no`` among them.

    A decoder's tokenizer adds ``<s>`` before a text, an encoder's also ``</s>`` after it.
    """
    tokenizer = Tokenizer.from_str(_trained())
    template = "<s> $A" if is_decoder else "<s> $A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def word_tokenizer(vocabulary: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """WordPiece in lower case without accents, as BERT has it, of these tokens; by default of fewer than 400, which the
    texts were cut into.
    """
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokens = {token: number for number, token in enumerate([*special, *vocabulary])}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if not vocabulary:
        tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    template = "[CLS] $A [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=MAX_TOKENS,
    )


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*TEXTS, " yes no" * 50], trainer)
    return tokenizer.to_str()


TWO_ADAPTERS = Lora(rank=4, alpha=8.0, adapters="two")


TINY_PMA = Pooling(kind="pma", num_heads=4)


def tiny_student_config(model: Path | str, *, pooling: Pooling = TINY_PMA, **backbone: Any) -> StudentConfig:
    """A small version of the default student (dot, rich, warm) with the tiny model in ``model``."""
    settings = {"model": str(model), "tuning": Lora(rank=4, alpha=8.0), "max_passage_tokens": 64}
    return StudentConfig(
        backbone=BackboneConfig.model_validate(settings | {"max_query_tokens": 64} | backbone),
        pooling=pooling,
        interaction=InteractionConfig(hidden_dim=16, feature_dim=8),
    )


def write_trained_student(root: Path, **backbone: Any) -> Path:
    """Write a student with random weights, so that both sides and both branches differ; return its folder."""
    student = Student.create(
        tiny_student_config(write_tiny_model(root / "backbone"), **backbone), device="cpu", dtype="float32"
    )
    student.prepare_training()
    randomise(student, scale=0.1)
    with torch.no_grad():
        for name, scale in student.interaction.named_parameters():
            if name.endswith("log_scale"):
                scale.sub_(3)  # so that the interaction changes the ranking, not only the scores
    student.eval()
    student.save(root / "tiny-student")
    return root / "tiny-student"


def tiny_teacher_config(model: Path | str, **settings: Any) -> TeacherConfig:
    """A teacher with the tiny decoder in ``model`` and the short prompt."""
    return TeacherConfig.model_validate({"model": str(model), "prompt": "short", "max_tokens": 128} | settings)


def randomise(module: torch.nn.Module, *, seed: int = 0, scale: float = 0.3) -> None:
    """Add random values to all trainable parameters, as if trained: a fresh student's gate and adapters are 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
