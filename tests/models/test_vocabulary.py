"""Students that know fewer tokens: same vectors for texts of these, and what is lost in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from d2llm.core.errors import InputError
from d2llm.models.export.export import export
from d2llm.models.student import Student
from d2llm.models.token_vectors import TokenProjection
from d2llm.models.vocabulary import LostTokens, lost_tokens, prune_vocabulary
from d2llm.retrieval.index import Index
from tiny_models import TEXTS, TWO_ADAPTERS, randomise, tiny_student_config, word_tokenizer, write_tiny_model

KNOWN = TEXTS[:4]
PIECES = [
    "▁the",
    "▁c",
    "at",
    "▁s",
    "▁",
    "a",
    "t",
    "s",
    "o",
    "n",
    "m",
    "▁sat",
    "▁on",
    "mat",
    "on",
    "▁dog",
    "d",
    "g",
    "東京",
    "東",
]


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """As XLM-R has it: special tokens first, the mask last, scores of pieces."""
    tokens = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokens += [(piece, -2.0 - index / 8) for index, piece in enumerate(PIECES)] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(tokens, unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def new_student(folder: Path, architecture: str, tokenizer: Any = None, **settings: Any) -> Student:
    """A student with an adapter, whose token embeddings count, saved and loaded."""
    pad = {"pad_token_id": tokenizer.pad_token_id} if tokenizer else {}
    write_tiny_model(folder / "model", architecture, **pad)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "model")
    student = Student.create(
        tiny_student_config(folder / "model", query_prefix="the cat ", **settings), device="cpu", dtype="float32"
    )
    student.prepare_training()
    randomise(student, scale=0.1)
    student.eval()
    rarity = np.random.default_rng(0).random(len(student.backbone.tokenizer)) + 0.1
    student.token_projection = TokenProjection(32, 8, rarity.tolist(), max_query_tokens=3)
    student.save(folder / "student")
    return Student.load(folder / "student", device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("architecture", "tokenizer"), [("bert", word_tokenizer()), ("xlm_roberta", unigram_tokenizer())]
)
def test_vectors_of_known_tokens_stay_the_same(tmp_path: Path, architecture: str, tokenizer: Any) -> None:
    student = new_student(tmp_path, architecture, tokenizer)
    prune_vocabulary(student, KNOWN).save(tmp_path / "pruned")
    pruned = Student.load(tmp_path / "pruned", device="cpu", dtype="float32")
    before, after = len(student.backbone.tokenizer), len(pruned.backbone.tokenizer)
    assert after < before
    assert pruned.backbone.model.get_input_embeddings().weight.shape == (after, 32)
    for kind in ("query", "passage"):
        expected, found = (each.encode_with_tokens(KNOWN, kind) for each in (student, pruned))
        np.testing.assert_array_equal(found.vectors, expected.vectors)
        np.testing.assert_array_equal(found.tokens.vectors, expected.tokens.vectors)
        assert found.lengths == expected.lengths
    assert lost_tokens(student, pruned, KNOWN).num_changed == 0
    assert pruned.fingerprint != student.fingerprint
    again = prune_vocabulary(pruned, KNOWN[:1])
    np.testing.assert_array_equal(again.encode_query(KNOWN[0]), student.encode_query(KNOWN[0]))
    index = Index.create(tmp_path / "index", pruned)
    index.upsert([{"id": str(index), "text": text} for index, text in enumerate(KNOWN)])
    found, expected = (
        {result.passage.text: result.score for result in ranking}  # an index rounds, which may swap near ties
        for ranking in (index.search(KNOWN[2]), student.rank(KNOWN[2], KNOWN))
    )
    assert found == pytest.approx(expected, rel=5e-3)
    pytest.importorskip("onnx")
    assert export(pruned, tmp_path / "onnx", "onnx").files


def test_what_is_lost_in_other_texts_is_counted(tmp_path: Path) -> None:
    student = new_student(tmp_path, "xlm_roberta", unigram_tokenizer())
    pruned = prune_vocabulary(student, ["the cat sat"])
    assert set(pruned.backbone.tokenizer.get_vocab()) == {
        *("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
        *("▁the", "▁c", "at", "▁sat"),  # the tokens
        *("a", "t", "s", "▁", "▁s"),  # and their characters
        *("o", "n", "m", "d", "g"),  # those of ASCII
        "東",  # the dearest piece
    }
    # ▁the ▁c at; ▁sat ▁on ▁ mat -> ▁sat ▁ o n ▁ m at; ▁ 東京 -> ▁ 東 <京>
    texts = ["the cat", "sat on mat", "東京"]
    assert lost_tokens(student, pruned, texts) == LostTokens(3, 2, 15, 1)


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this one is BPE"):
        prune_vocabulary(new_student(tmp_path / "bpe", "llama"), KNOWN)
    student = new_student(tmp_path / "words", "bert", word_tokenizer())
    with pytest.raises(InputError, match="no texts whose tokens"):
        prune_vocabulary(student, [])
    two = new_student(tmp_path / "two", "bert", word_tokenizer(), tuning=TWO_ADAPTERS)
    with pytest.raises(InputError, match="adapters of their own"):
        prune_vocabulary(two, KNOWN)
