"""Late chunking: parts of a text are pooled from states that have seen all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import processors

from d2llm.core.errors import InputError
from d2llm.core.recipe import InteractionConfig, PoolingConfig
from d2llm.core.types import WholeText
from d2llm.models.late_chunking import window_start
from d2llm.models.student import Student
from tiny_models import DIM, MAX_TOKENS, TEXTS, randomise, tiny_student_config, write_tiny_model

ARCHITECTURES = ["bert", "modernbert", "xlm_roberta", "llama"]
SENTENCES = ["the cat sat on the mat. ", "Éclairs, 猫 and 🐈‍⬛ sleep! ", "ships sail over the sea. ", "snow covers all"]
TEXT = "".join(SENTENCES)


def places(parts):
    """Where parts stand in the text that they make up."""
    ends = np.cumsum([len(part) for part in parts]).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(folder / name, name) for name in ARCHITECTURES}


def student_of(folder, *, own="mean", pooling=None, head="anchored", **backbone):
    """As good as trained; a decoder is pooled by its mean."""
    settings = {"pooling": own, "max_passage_tokens": 256} | backbone
    config = tiny_student_config(folder, **settings).model_copy(
        update={"interaction": InteractionConfig(head=head, hidden_dim=16, feature_dim=8)}
        | ({} if pooling is None else {"pooling": pooling})
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


def encode(student, text, spans, **whole):
    return student.encode_chunks([(WholeText(text, **whole), spans)])


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def states_of(student, ids):
    with torch.inference_mode():
        return student.backbone.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def pooled(student, states):
    """Mean on the sphere and PMA of the states [tokens, dim] of one part, each on its own."""
    mean = states.double().mean(0)
    with torch.inference_mode():
        pma = student.pooling.pma(states[None], torch.ones(1, len(states), dtype=torch.bool))[0]
    return (mean / mean.norm() * DIM**0.5 + 0.3 * pma.double()).numpy()


@pytest.mark.parametrize("title", ["", "On cats"])
@pytest.mark.parametrize("text", [TEXT, "x", ""])
def test_a_text_of_one_part_is_as_it_is_alone(student, title, text):
    alone = student.encode_passages([f"{title}\n{text}" if title else text])
    late = encode(student, text, [(0, len(text))], title=title)
    close(late.vectors, alone.vectors)
    assert (late.num_tokens, late.num_windows, late.truncated) == (alone.num_tokens, 1, ())


@pytest.mark.parametrize("head", ["anchored", "cosine"])
def test_so_it_is_with_a_prefix_and_every_head(models, head):
    student = student_of(models["bert"], passage_prefix="passage: ", head=head)
    late = encode(student, TEXT, [(0, len(TEXT))], title="On cats")
    close(late.vectors, student.encode_passages([f"On cats\n{TEXT}"]).vectors)


@pytest.mark.parametrize("title", ["", "On cats"])
def test_against_states_pooled_by_hand(student, title):
    """Tokens of a part are found from its characters, one by one, by the tokenizer itself."""
    before = f"{title}\n" if title else ""
    encoding = student.backbone.tokenizer(before + TEXT)
    ids = encoding["input_ids"]
    states = states_of(student, ids)
    # Special tokens and title.
    shared = [t for t in range(len(ids)) if (span := encoding.token_to_chars(t)) is None or span.end <= len(before)]
    wanted = []
    for start, end in places(SENTENCES):
        own = {encoding.char_to_token(len(before) + place) for place in range(start, end)} - {None}
        own |= set(range(min(own), max(own) + 1))  # a character of several tokens tells the first alone
        if end < len(TEXT):
            own = {t for t in own if encoding.token_to_chars(t).start < len(before) + end}
        else:
            own = set(range(min(own), len(ids)))
        wanted.append(pooled(student, states[sorted({*own, *shared})]))
    late = encode(student, TEXT, places(SENTENCES), title=title)
    close(late.vectors, np.array(wanted))
    assert late.num_windows == 1


def test_the_rest_of_the_text_counts(models):
    ends = {"bert": "ships sail far. the cat sat.", "llama": "ships sail far. the cat sat."}
    for name, text in ends.items():
        student = student_of(models[name])
        (first, second), at = encode(student, text, [(0, 15), (16, 28)]).vectors, text.index("the")
        behind = encode(student, text.replace("cat", "dog"), [(0, 15), (16, 28)]).vectors
        before = encode(student, text.replace("far", "home"), [(at + 1, at + 13)]).vectors
        # A decoder has not seen what comes.
        assert np.allclose(first, behind[0], atol=1e-6) == (name == "llama")
        assert np.abs(second - before[0]).max() > 1e-3


def test_together_as_alone(student):
    """Texts of all lengths, some with several windows: batches do not change a vector, and each is in its place."""
    texts = [" ".join(TEXTS[:count]) for count in (1, 8, 3, 5, 2)] + ["", "猫"]
    asked = []
    for n, text in enumerate(texts):
        spans = [(at, min(at + 30, len(text))) for at in range(0, max(len(text), 1), 30)]
        asked.append((WholeText(text, "title" if n % 2 else "", 32), spans[::-1]))
    together = student.encode_chunks(asked)
    alone = [student.encode_chunks([one]) for one in asked]
    close(together.vectors, np.concatenate([one.vectors for one in alone]))
    assert together.num_tokens == sum(one.num_tokens for one in alone)
    assert together.num_windows == sum(one.num_windows for one in alone)
    assert together.num_windows > len(texts) + 4
    assert student.encode_chunks([]).vectors.shape == (0, DIM)


def test_windows_by_hand(student):
    """A text of several windows, each read with the title and the special tokens around it."""
    text = " ".join(TEXTS)
    spans = [(at, min(at + 20, len(text))) for at in range(0, len(text), 20)]
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
        at = window_start(tokens[0], tokens[-1] + 1, len(body), room)
        used.add(at)
        window = [*ids[:first], *body[at : at + room], *ids[len(ids) - closing :]]
        own = [*range(first), *(first + t - at for t in tokens), *range(len(window) - closing, len(window))]
        close(vector, pooled(student, states_of(student, window)[own]))
    assert late.num_windows == len(used) > 2
    assert late.truncated == ()


@pytest.mark.parametrize(
    ("span", "start"),
    [
        ((0, 1), 0),  # the text begins there
        ((3, 4), 2),  # [0, 4) has nothing behind it; in [2, 6) there is a token before and two behind
        ((4, 5), 2),  # [2, 6) and [4, 8): nothing before it in the second
        ((9, 10), 6),
        ((1, 4), 0),  # in the first alone
        ((1, 5), 1),  # in none: one of its own
        ((3, 6), 2),
        ((3, 7), 3),  # in none, and as long as a window
        ((3, 9), 3),  # longer than a window
        ((4, 10), 4),
        ((10, 10), 6),
    ],
)
def test_the_window_of_a_part(span, start):
    """Ten tokens, windows of four: at 0, 2, 4 and 6."""
    assert window_start(*span, length=10, room=4) == start


def test_a_window_holds_what_fits():
    for begin in range(30):
        for stop in range(begin, 31):
            at = window_start(begin, stop, length=30, room=7)
            assert 0 <= at <= 23
            assert at <= begin
            assert stop <= at + 7 or (at == min(begin, 23) and stop - begin > 7)


def test_by_default_a_window_is_what_the_backbone_reads(student):
    limit = MAX_TOKENS
    assert student.chunk_reader.window() == limit
    text = " ".join(TEXTS * 12)
    late = encode(student, text, [(0, 5), (len(text) - 5, len(text))])
    assert late.num_windows == 2
    assert late.num_tokens == 2 * limit


def test_what_is_not_read_whole_is_told(student):
    text = " ".join(TEXTS)
    late = encode(student, text, [(0, 10), (0, len(text)), (20, 30)], window=32)
    assert late.truncated == (1,)
    late = encode(student, text, [(0, 10), (20, 30)], title=text, window=32)
    assert late.truncated == (0, 1)
    assert np.isfinite(late.vectors).all()


def test_empty_parts(student):
    """One has the special tokens alone, which have seen the text."""
    ids = student.backbone.tokenizer(TEXT)["input_ids"]
    special = [t for t, token in enumerate(ids) if token in (1, 2)]
    late = encode(student, TEXT, [(5, 5), (0, 8)])
    close(late.vectors[0], pooled(student, states_of(student, ids)[special]))


def test_without_special_tokens_an_empty_part_is_one_token(models):
    student = student_of(models["llama"])
    tokenizer = student.backbone.tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    alone = student.encode_passages(["", "the cat sat"])
    late = encode(student, "the cat sat", [(4, 4), (0, 11)])
    close(late.vectors, alone.vectors)
    assert late.num_windows == 2


@pytest.mark.parametrize(("name", "own"), [("llama", "last"), ("bert", "first")])
def test_one_tokens_state_is_no_parts(models, name, own):
    student = student_of(models[name], own=own)
    with pytest.raises(InputError, match=f"pooled by its {own} token"):
        encode(student, TEXT, [(0, 5)])


def test_pma_alone_can(models):
    """Where the backbone's own pooling takes no part, it does not matter which it is."""
    student = student_of(models["llama"], own="last", pooling=PoolingConfig(num_heads=4, warm_start=False))
    assert not student.pooling.uses_own
    close(encode(student, TEXT, [(0, len(TEXT))]).vectors, student.encode_passages([TEXT]).vectors)


def test_refusals(models):
    student = student_of(models["bert"])
    for span in ((-1, 3), (4, 3), (0, len(TEXT) + 1)):
        with pytest.raises(InputError, match="is outside a text of"):
            encode(student, TEXT, [span])
    for window in (15, MAX_TOKENS + 1):
        with pytest.raises(InputError, match=f"give 16 to {MAX_TOKENS}"):
            encode(student, TEXT, [(0, 3)], window=window)


def test_a_tokenizer_without_places_is_refused(models, monkeypatch):
    student = student_of(models["bert"])
    monkeypatch.setattr(type(student.backbone.tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="gives no character offsets"):
        encode(student, TEXT, [(0, 3)])
