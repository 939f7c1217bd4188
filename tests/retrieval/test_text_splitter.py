"""Texts in pieces that end with sentences."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from d2llm.retrieval import chunking
from d2llm.retrieval.chunking import TextSplitter


def word_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are words and single signs, as in BERT, but of any length."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


class CountingTokenizer:
    """Counts the characters that are tokenized."""

    def __init__(self) -> None:
        self.num_characters = 0
        self._tokenizer = word_tokenizer()

    def encode(self, text: str, **options: bool):
        self.num_characters += len(text)
        return self._tokenizer.encode(text, **options)


def pieces(text: str, room: int = 16, overlap: int = 0) -> list[str]:
    return [piece for _, piece in TextSplitter(word_tokenizer(), room, overlap).pieces(text)]


class TestEnds:
    @pytest.mark.parametrize(
        ("text", "room", "ends"),
        [
            ("One two three four. Five six seven eight. Nine ten eleven.", 8, ["four.", "eight.", "eleven."]),
            ("It costs 3.14 euros. See Dr. Smith and J. Doe. More.", 10, ["euros.", "J. Doe.", "More."]),
            ("As in fig. 3 here it is. Say no. Then go on and on.", 11, ["3 here it is.", "on and on."]),
            ("Use it, e.g. Here or there. Then stop at once, please.", 12, ["or there.", "please."]),
            ("He asked “Why?” Then he left. She stayed here.", 8, ["“Why?”", "here."]),
            ("one two three four five six seven eight nine ten", 8, ["seven eight", "nine ten"]),
            ("one two three, four five six seven eight nine ten", 10, ["eight nine", "ten"]),
            ("one two three four five six, seven eight nine ten", 9, ["five six,", "nine ten"]),
            ("今天天气很好。我们去公园玩。晚上回家。", 3, ["很好。", "公园玩。", "回家。"]),
            ("یہ ایک جملہ ہے۔ یہ دوسرا ہے۔ یہ تیسرا ہے۔", 8, ["جملہ ہے۔", "تیسرا ہے۔"]),
            ("यह पहला वाक्य है। यह दूसरा है। यह तीसरा है।", 8, ["वाक्य है।", "तीसरा है।"]),
            ("- one two three\n- four five six\n- seven eight nine", 8, ["six", "nine"]),
            ("| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |", 22, ["| 1 | 2 |", "| 3 | 4 |"]),
            ("def f():\n    x = 1\n    return x + 1 + 2\n\ndef g():\n    pass", 10, ["x = 1", "1 + 2", "pass"]),
            ("Use this:\nx = 1 + 2 + 3\nand that is all", 10, ["+ 3", "all"]),
        ],
    )
    def test_with_sentences_items_rows_and_lines(self, text, room, ends):
        found = pieces(text, room)
        assert len(found) == len(ends)
        assert all(piece.endswith(end) for piece, end in zip(found, ends, strict=True)), found

    def test_a_line_that_goes_on_in_the_next_does_not_end_a_sentence(self):
        wrapped = (
            "The first sentence is so long that it goes on\nin the line below. The second sentence is long\n"
            "as well and ends here. Third."
        )
        assert pieces(wrapped, 24) == [
            "The first sentence is so long that it goes on\nin the line below.",
            "The second sentence is long\nas well and ends here. Third.",
        ]

    def test_a_paragraph_that_fills_half_of_a_piece_ends_it(self):
        text = "One two three four five six seven.\n\nEight nine ten. Eleven twelve thirteen fourteen."
        assert pieces(text, 14)[0] == "One two three four five six seven."
        assert pieces("One.\n\nEight nine ten. Eleven twelve thirteen fourteen.", 8)[0] == "One.\n\nEight nine ten."

    def test_no_letter_is_divided_from_its_marks(self):
        text = "हि" * 200
        assert not any(piece.startswith("\u093f") for piece in pieces(text, 8))
        family = "👩\u200d👧" * 100
        assert not any(piece.startswith("\u200d") or piece.endswith("\u200d") for piece in pieces(family, 8))


class TestLimits:
    @pytest.mark.parametrize("text", ["a" * 20_000, "z" + " " * 20_000 + "z", "x\u200b" * 10_000, "\U0001f600" * 3_000])
    def test_what_the_tokenizer_does_not_count_has_a_length_too(self, text):
        assert max(map(len, pieces(text, 64))) <= 64 * 64
        assert "".join("".join(pieces(text, 64)).split()) == "".join(text.split())

    def test_a_word_of_more_than_32_characters_counts_as_a_token_for_each_four(self):
        assert pieces(" ".join(["a" * 32] * 4), room=2) == [" ".join(["a" * 32] * 2)] * 2
        assert max(map(len, pieces(" ".join(["a" * 33] * 4), room=8))) <= 32
        assert pieces("a" * 100, room=10) == ["a" * 40, "a" * 40, "a" * 20]

    @given(
        st.text(alphabet="ab.!? \n\t\"'(),;:-|#1\u3002\u732b\u00e9\u0301\u200d", max_size=400),
        st.integers(4, 40),
        st.integers(0, 3),
    )
    def test_every_character_is_in_a_piece(self, text, room, overlap):
        splitter = TextSplitter(word_tokenizer(), room, 0)
        found = splitter.pieces(text)
        assert "".join("".join(piece.split()) for _, piece in found) == "".join(text.split())
        assert all(text[start : start + len(piece)] == piece for start, piece in found)
        assert all(len(word_tokenizer().encode(piece).ids) <= room for _, piece in found)
        repeated = TextSplitter(word_tokenizer(), room, overlap).pieces(text)
        covered = {at for start, piece in repeated for at in range(start, start + len(piece))}
        assert all(at in covered for at, character in enumerate(text) if not character.isspace())
        assert all(one[0] < two[0] for one, two in itertools.pairwise(repeated))

    @given(st.lists(st.integers(1, 14), min_size=2, max_size=30))
    def test_a_piece_ends_with_a_sentence_if_one_fits(self, lengths):
        text = " ".join("Word" + " word" * (length - 1) + "." for length in lengths)
        assert all(piece.endswith(".") for piece in pieces(text, 16))


class TestTime:
    @pytest.mark.parametrize(
        "unit",
        [
            "a",
            "word ",
            "word, ",
            "word\n",
            "A sentence here. ",
            "。",
            "é ",
            "\n\n",
            "(",
            '."',
            ". ",
            "a" * 40 + "\n",
            "ि",
        ],
    )
    def test_work_is_linear(self, unit):
        """What is tokenized is twice the text at most, and a multiple of it for each piece that is shortened."""
        work: list[int] = []
        for size in (20_000, 80_000):
            tokenizer = CountingTokenizer()
            TextSplitter(tokenizer, 64).pieces(unit * (size // len(unit)))
            work.append(tokenizer.num_characters)
        assert work[1] <= 4.5 * work[0] + 1_000

    def test_steps_are_linear(self, monkeypatch):
        """Also without a tokenizer: every search for a boundary looks at one piece."""
        looked_at: list[int] = []
        original = chunking._last_boundary

        def counted(text, start, least, end, *others):
            looked_at.append(end - start)
            return original(text, start, least, end, *others)

        monkeypatch.setattr(chunking, "_last_boundary", counted)
        pieces("a" * 100_000, 64)
        assert sum(looked_at) <= 3 * 100_000

    def test_four_megabytes_without_an_end(self):
        import time

        def seconds(size: int) -> float:
            begin = time.process_time()
            found = pieces("x" * size, 128)
            assert sum(map(len, found)) == size
            return time.process_time() - begin

        assert seconds(4_000_000) < 3 * (4 * seconds(1_000_000)) + 1


def test_blocks_end_before_white_space(monkeypatch):
    monkeypatch.setattr(chunking, "_BLOCK", 20)
    text = "The cat sleeps. The dog runs. " * 20
    assert pieces(text, 9) == ["The cat sleeps. The dog runs."] * 20
    assert re.sub(r"\s", "", "".join(pieces("x" * 95, 9))) == "x" * 95
