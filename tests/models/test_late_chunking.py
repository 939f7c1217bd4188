"""Late chunking: parts of a text are pooled from states computed over the whole text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import processors

from d2llm.core.errors import InputError
from d2llm.core.types import WholeText
from d2llm.models.late_chunking import window_start
from d2llm.models.student import Student
from d2llm.recipe import InteractionConfig, Pooling
from tiny_models import DIM, MAX_TOKENS, TEXTS, randomise, tiny_student_config, write_tiny_model

ARCHITECTURES = ["bert", "modernbert", "xlm_roberta", "llama"]
SENTENCES = ["the cat sat on the mat. ", "Éclairs, 猫 and 🐈‍⬛ sleep! ", "ships sail over the sea. ", "snow covers all"]
TEXT = "".join(SENTENCES)


def part_spans(parts):
    """The (start, end) of each part in the text that the parts make up."""
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(folder / name, name) for name in ARCHITECTURES}


def student_of(folder, *, backbone_pooling="mean", pooling=None, head="dot", **backbone):
    """Stands in for a trained student; mean pooling by default, for decoders too."""
    pooling = pooling or Pooling(kind="pma", num_heads=4, pooling=backbone_pooling)
    config = tiny_student_config(folder, pooling=pooling, **{"max_passage_tokens": 256} | backbone).model_copy(
        update={"interaction": InteractionConfig(head=head, hidden_dim=16, feature_dim=8)}
    )
    student = Student.create(config, device="cpu", dtype="float32")
    student.prepare_training()
    randomise(student, scale=0.05)
    if student.pooling.gate is not None:
        with torch.no_grad():
            student.pooling.gate.fill_(0.3)
    return student.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def student(request, models):
    return student_of(models[request.param])


def encode(student, text, spans, **options):
    return student.encode_chunks([(WholeText(text, **options), spans)])


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def backbone_states(student, ids):
    with torch.inference_mode():
        return student.backbone.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def pooled(student, states):
    """Normalised mean plus gated PMA of one part's states [tokens, dim], each computed separately."""
    mean = states.double().mean(0)
    with torch.inference_mode():
        pma = student.pooling.pma(states[None], torch.ones(1, len(states), dtype=torch.bool))[0]
    return (mean / mean.norm() * DIM**0.5 + 0.3 * pma.double()).numpy()


@pytest.mark.parametrize("title", ["", "On cats"])
@pytest.mark.parametrize("text", [TEXT, "x", ""])
def test_a_single_part_encodes_like_the_whole_text(student, title, text):
    alone = student.encode_passages([f"{title}\n{text}" if title else text])
    late = encode(student, text, [(0, len(text))], title=title)
    assert_close(late.vectors, alone.vectors)
    assert (late.num_tokens, late.num_windows, late.truncated) == (alone.num_tokens, 1, ())


@pytest.mark.parametrize("head", ["dot", "cosine"])
def test_a_single_part_with_a_prefix_and_either_head(models, head):
    student = student_of(models["bert"], passage_prefix="passage: ", head=head)
    late = encode(student, TEXT, [(0, len(TEXT))], title="On cats")
    assert_close(late.vectors, student.encode_passages([f"On cats\n{TEXT}"]).vectors)


@pytest.mark.parametrize("title", ["", "On cats"])
def test_parts_match_states_pooled_by_hand(student, title):
    """The tokens of a part are looked up character by character in the tokenizer's own encoding."""
    before = f"{title}\n" if title else ""
    encoding = student.backbone.tokenizer(before + TEXT)
    ids = encoding["input_ids"]
    states = backbone_states(student, ids)
    # Special tokens and the title belong to every part.
    shared = [t for t in range(len(ids)) if (span := encoding.token_to_chars(t)) is None or span.end <= len(before)]
    expected = []
    for start, end in part_spans(SENTENCES):
        tokens = {encoding.char_to_token(len(before) + position) for position in range(start, end)} - {None}
        tokens |= set(range(min(tokens), max(tokens) + 1))  # a character of several tokens is mapped to the first alone
        if end < len(TEXT):
            tokens = {t for t in tokens if encoding.token_to_chars(t).start < len(before) + end}
        else:
            tokens = set(range(min(tokens), len(ids)))
        expected.append(pooled(student, states[sorted({*tokens, *shared})]))
    late = encode(student, TEXT, part_spans(SENTENCES), title=title)
    assert_close(late.vectors, np.array(expected))
    assert late.num_windows == 1


def test_a_part_depends_on_the_rest_of_the_text(models):
    text = "ships sail far. the cat sat."
    for name in ("bert", "llama"):
        student = student_of(models[name])
        (first, second), offset = encode(student, text, [(0, 15), (16, 28)]).vectors, text.index("the")
        changed_before = encode(student, text.replace("cat", "dog"), [(0, 15), (16, 28)]).vectors
        changed_after = encode(student, text.replace("far", "home"), [(offset + 1, offset + 13)]).vectors
        # A decoder does not see what follows.
        assert np.allclose(first, changed_before[0], atol=1e-6) == (name == "llama")
        assert np.abs(second - changed_after[0]).max() > 1e-3


def test_texts_encode_the_same_together_and_alone(student):
    """Texts of all lengths, some with several windows: batches change neither the vectors nor their order."""
    texts = [" ".join(TEXTS[:count]) for count in (1, 8, 3, 5, 2)] + ["", "猫"]
    requests = []
    for n, text in enumerate(texts):
        spans = [(start, min(start + 30, len(text))) for start in range(0, max(len(text), 1), 30)]
        requests.append((WholeText(text, "title" if n % 2 else "", 32), spans[::-1]))
    together = student.encode_chunks(requests)
    alone = [student.encode_chunks([request]) for request in requests]
    assert_close(together.vectors, np.concatenate([encoded.vectors for encoded in alone]))
    assert together.num_tokens == sum(encoded.num_tokens for encoded in alone)
    assert together.num_windows == sum(encoded.num_windows for encoded in alone)
    assert together.num_windows > len(texts) + 4
    assert student.encode_chunks([]).vectors.shape == (0, DIM)


def test_windows_by_hand(student):
    """A text of several windows, each read with the title and the special tokens around it."""
    text = " ".join(TEXTS)
    spans = [(start, min(start + 20, len(text))) for start in range(0, len(text), 20)]
    encoding = student.backbone.tokenizer("t\n" + text)
    ids, closing = encoding["input_ids"], 0 if student.backbone.tokenizer("")["input_ids"][-1] == 1 else 1
    first = encoding.char_to_token(2)
    body = ids[first : len(ids) - closing]
    room = 40 - first - closing
    late = encode(student, text, spans, title="t", window=40)
    used = set()
    for span, vector in zip(spans, late.vectors, strict=True):
        tokens = [
            t - first
            for t in range(first, first + len(body))
            if encoding.token_to_chars(t).start < span[1] + 2 and encoding.token_to_chars(t).end > span[0] + 2
        ]
        start = window_start(tokens[0], tokens[-1] + 1, len(body), room)
        used.add(start)
        window = [*ids[:first], *body[start : start + room], *ids[len(ids) - closing :]]
        positions = [*range(first), *(first + t - start for t in tokens), *range(len(window) - closing, len(window))]
        assert_close(vector, pooled(student, backbone_states(student, window)[positions]))
    assert late.num_windows == len(used) > 2
    assert late.truncated == ()


@pytest.mark.parametrize(
    ("span", "start"),
    [
        ((0, 1), 0),  # the text begins here
        ((3, 4), 2),  # [0, 4) has no token after it; [2, 6) has one before and two after
        ((4, 5), 2),  # in [2, 6) and [4, 8), but the second has no token before it
        ((9, 10), 6),
        ((1, 4), 0),  # only in the first window
        ((1, 5), 1),  # in no window: gets its own
        ((3, 6), 2),
        ((3, 7), 3),  # in no window, and as long as one
        ((3, 9), 3),  # longer than a window
        ((4, 10), 4),
        ((10, 10), 6),
    ],
)
def test_window_start_of_a_part(span, start):
    """Ten tokens, windows of four: at 0, 2, 4 and 6."""
    assert window_start(*span, length=10, room=4) == start


def test_a_window_covers_a_part_that_fits():
    for begin in range(30):
        for stop in range(begin, 31):
            start = window_start(begin, stop, length=30, room=7)
            assert 0 <= start <= 23
            assert start <= begin
            assert stop <= start + 7 or (start == min(begin, 23) and stop - begin > 7)


def test_the_default_window_is_the_backbones_limit(student):
    limit = MAX_TOKENS
    assert student.chunk_reader.window() == limit
    text = " ".join(TEXTS * 12)
    late = encode(student, text, [(0, 5), (len(text) - 5, len(text))])
    assert late.num_windows == 2
    assert late.num_tokens == 2 * limit


def test_parts_that_do_not_fit_are_reported(student):
    text = " ".join(TEXTS)
    late = encode(student, text, [(0, 10), (0, len(text)), (20, 30)], window=32)
    assert late.truncated == (1,)
    late = encode(student, text, [(0, 10), (20, 30)], title=text, window=32)
    assert late.truncated == (0, 1)
    assert np.isfinite(late.vectors).all()


def test_an_empty_part_pools_the_special_tokens(student):
    """An empty part has the special tokens alone, whose states depend on the text."""
    ids = student.backbone.tokenizer(TEXT)["input_ids"]
    special = [t for t, token in enumerate(ids) if token in (1, 2)]
    late = encode(student, TEXT, [(5, 5), (0, 8)])
    assert_close(late.vectors[0], pooled(student, backbone_states(student, ids)[special]))


def test_without_special_tokens_an_empty_part_is_one_token(models):
    student = student_of(models["llama"])
    tokenizer = student.backbone.tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    alone = student.encode_passages(["", "the cat sat"])
    late = encode(student, "the cat sat", [(4, 4), (0, 11)])
    assert_close(late.vectors, alone.vectors)
    assert late.num_windows == 2


@pytest.mark.parametrize(("name", "pooling"), [("llama", "last"), ("bert", "first")])
def test_single_token_pooling_is_refused(models, name, pooling):
    student = student_of(models[name], backbone_pooling=pooling)
    with pytest.raises(InputError, match=f"pooled by its {pooling} token"):
        encode(student, TEXT, [(0, 5)])


def test_pma_alone_allows_any_backbone_pooling(models):
    """Without a warm start the backbone's own pooling is unused, so any kind will do."""
    student = student_of(models["llama"], pooling=Pooling(kind="pma", num_heads=4, pooling="last", warm_start=False))
    assert_close(encode(student, TEXT, [(0, len(TEXT))]).vectors, student.encode_passages([TEXT]).vectors)


def test_invalid_spans_and_windows_are_refused(models):
    student = student_of(models["bert"])
    for span in ((-1, 3), (4, 3), (0, len(TEXT) + 1)):
        with pytest.raises(InputError, match="is outside a text of"):
            encode(student, TEXT, [span])
    for window in (15, MAX_TOKENS + 1):
        with pytest.raises(InputError, match=f"give 16 to {MAX_TOKENS}"):
            encode(student, TEXT, [(0, 3)], window=window)


def test_a_tokenizer_without_offsets_is_refused(models, monkeypatch):
    student = student_of(models["bert"])
    monkeypatch.setattr(type(student.backbone.tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="gives no character offsets"):
        encode(student, TEXT, [(0, 3)])
