"""Reading passages as vectors: decoding against reading everything at once, saving, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d2llm.core.errors import DataFormatError, InputError, MismatchError, ModelError
from d2llm.models.backbone import Backbone
from d2llm.models.listwise_reader import ListwiseReader
from d2llm.recipe import BackboneConfig, Lora
from d2llm.training.pretrain import word_head
from tiny_models import DIM, MAX_TOKENS, randomise, write_tiny_model

VECTOR_DIM = 6
QUERIES = ["the cat", "a dog runs", "bread is baked from flour, water and salt"]
ROUNDING = 1e-4


def new_reader(model, *, steps=5, **backbone):
    config = BackboneConfig(model=str(model), tuning=Lora(rank=2, alpha=4.0, dropout=0.0), **backbone)
    loaded = Backbone.load(config, device="cpu", dtype="float32")
    return ListwiseReader(loaded, VECTOR_DIM, "a-student", steps=steps).eval()


def random_vectors(number, *, passages=8, seed=0):
    return np.random.default_rng(seed).normal(size=(number, passages, VECTOR_DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def reader(model):
    return new_reader(model)


@pytest.fixture(scope="module")
def tuned(model):
    reader = new_reader(model, layers=1)
    reader.backbone.prepare_training()
    randomise(reader, scale=0.1)
    return reader.eval()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("seed", range(3))
def test_the_decoded_order_is_that_of_steps_without_a_cache(architecture, seed, tmp_path):
    reader = new_reader(write_tiny_model(tmp_path / "model", architecture, seed=seed))
    vectors = random_vectors(3, seed=seed)
    read = reader.rank(QUERIES, list(vectors))
    for query, own, result in zip(QUERIES, vectors, read, strict=True):
        drawn = []
        for step in range(5):
            with torch.no_grad():
                logits = reader.step_logits([query], own[None], [[*drawn, 0]])[0, -1].numpy()
            if step == 0:
                np.testing.assert_allclose(result.logits, logits, atol=ROUNDING)
            logits[drawn] = -np.inf
            drawn.append(int(logits.argmax()))
        assert result.order.tolist() == drawn + [index for index in range(8) if index not in drawn]


def test_the_repetition_loss_is_that_of_each_texts_tokens_after_its_vector(reader):
    """Against texts one by one, word by word, in float64."""
    texts, (vectors,) = ["the cat", "a dog runs far " * 40], random_vectors(1, passages=2)
    head = word_head(reader.backbone)
    tokenizer, embeddings = reader.backbone.tokenizer, reader.backbone.model.get_input_embeddings().weight
    losses = []
    with torch.no_grad():
        for text, vector in zip(texts, torch.from_numpy(vectors), strict=True):
            ids = [
                tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("Passage:", " means the same as:")
            ]
            scaled = vector / vector.square().mean().sqrt()
            read = torch.cat([embeddings[ids[0]], reader.projection(scaled)[None], embeddings[ids[1]]])
            for token in tokenizer(f" {text}", add_special_tokens=False)["input_ids"][:64]:
                state = reader.backbone.model(inputs_embeds=read[None]).last_hidden_state[0, -1]
                losses.append(-float(head(state[None])[0].double().log_softmax(-1)[token]))
                read = torch.cat([read, embeddings[token][None]])
        assert float(reader.repetition_loss(texts, vectors, head)) == pytest.approx(np.mean(losses), rel=1e-4)


def test_texts_are_read_after_their_vectors(reader):
    """Against one row of vectors of tokens, put together by hand."""
    (vectors,), texts = random_vectors(1, passages=3), ["the cat", "a dog runs far " * 40, "bread"]
    tokenizer, embeddings = reader.backbone.tokenizer, reader.backbone.model.get_input_embeddings().weight

    def tokens(text):
        return embeddings[tokenizer(text, add_special_tokens=False)["input_ids"]]

    with torch.no_grad():
        passages = reader.projection(torch.from_numpy(vectors / np.sqrt((vectors**2).mean(axis=1, keepdims=True))))
        read = [tokens("Query: the cat"), tokens("\nPassages:")]
        for passage, text in zip(passages, texts, strict=True):
            read += [passage[None], tokens(f" {text}")[:64]]
        read += [tokens("\nBest first:"), passages[2:3]]
        states = reader.backbone.model(inputs_embeds=torch.cat(read)[None]).last_hidden_state[0, -2:]
        expected = 10 * torch.nn.functional.normalize(states, dim=-1) @ passages.T
        logits = reader.step_logits(["the cat"], vectors[None], [[2, 0]], [texts])
    np.testing.assert_allclose(logits[0], expected, atol=ROUNDING)
    with pytest.raises(InputError, match="let it read fewer passages"):
        reader.step_logits(["the cat"], random_vectors(1, passages=80), [[2, 0]], [["bread and salt " * 60] * 80])


def test_padding_changes_no_logit(reader):
    vectors, orders = random_vectors(3), [[3, 1, 2], [0, 4, 5], [7, 6, 0]]
    with torch.no_grad():
        together = reader.step_logits(QUERIES, vectors, orders)
        alone = [
            reader.step_logits([query], own[None], [order])[0]
            for query, own, order in zip(QUERIES, vectors, orders, strict=True)
        ]
    assert together.shape == (3, 3, 8)
    np.testing.assert_allclose(together, torch.stack(alone), atol=ROUNDING)


def test_lists_of_other_lengths_do_not_matter(reader):
    vectors = random_vectors(3)
    lists = [vectors[0], vectors[1, :3], vectors[2, :1], vectors[0, :0]]
    queries = [*QUERIES, "no passage"]
    together = reader.rank(queries, lists)
    for query, own, result in zip(queries, lists, together, strict=True):
        (alone,) = reader.rank([query], [own])
        assert result.order.tolist() == alone.order.tolist()
        assert sorted(result.order.tolist()) == list(range(len(own)))
        np.testing.assert_allclose(result.logits, alone.logits, atol=ROUNDING)
    assert reader.rank([], []) == []


def test_of_equal_passages_the_first_is_drawn_first(reader):
    own = random_vectors(1)[0, [0, 1, 1, 0]]
    own[1:3] = own[1]
    (result,) = reader.rank(["the cat"], [np.repeat(own[:1], 4, axis=0)])
    assert result.order.tolist() == [0, 1, 2, 3]


def test_the_first_vectors_have_the_size_of_tokens(reader):
    embeddings = reader.backbone.model.get_input_embeddings().weight
    vectors = random_vectors(50, passages=20).reshape(-1, VECTOR_DIM)
    made = reader._project(vectors)
    assert made.shape == (1_000, DIM)
    assert made.std().item() == pytest.approx(embeddings.std().item(), rel=0.1)


def test_a_long_query_is_cut(reader):
    (result,) = reader.rank(["bread and salt " * 500], [random_vectors(1)[0]])
    assert len(result.order) == 8


def test_a_saved_reader_ranks_as_before(tuned, tmp_path):
    tuned.save(tmp_path / "reader", {"data": ["tiny"]})
    loaded = ListwiseReader.load(tmp_path / "reader", device="cpu", dtype="float32")
    assert (loaded.student, loaded.vector_dim, loaded.steps) == ("a-student", VECTOR_DIM, 5)
    assert loaded.backbone.num_layers == 1
    vectors = random_vectors(3)
    for before, after in zip(tuned.rank(QUERIES, list(vectors)), loaded.rank(QUERIES, list(vectors)), strict=True):
        np.testing.assert_allclose(after.logits, before.logits, atol=ROUNDING)  # its adapter is merged
        assert after.order.tolist() == before.order.tolist()
    manifest = json.loads((tmp_path / "reader" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["data"]) == ("reader", ["tiny"])
    assert loaded.save(tmp_path / "again") == manifest["fingerprint"]
    again = ListwiseReader.load(tmp_path / "again", device="cpu", dtype="float32")
    for first, second in zip(loaded.rank(QUERIES, list(vectors)), again.rank(QUERIES, list(vectors)), strict=True):
        assert first.logits.tolist() == second.logits.tolist()


def test_bfloat16(tuned, tmp_path):
    tuned.save(tmp_path / "reader")
    loaded = ListwiseReader.load(tmp_path / "reader", device="cpu", dtype="bfloat16")
    vectors = random_vectors(3)
    for precise, rough in zip(tuned.rank(QUERIES, list(vectors)), loaded.rank(QUERIES, list(vectors)), strict=True):
        assert rough.logits.dtype == np.float32
        np.testing.assert_allclose(rough.logits, precise.logits, atol=0.1 * np.abs(precise.logits).max())


def test_another_base_is_refused(tuned, model, tmp_path):
    tuned.save(tmp_path / "reader")
    manifest = tmp_path / "reader" / "manifest.json"
    content = json.loads(manifest.read_text())
    other = write_tiny_model(tmp_path / "other", seed=1)
    manifest.write_text(json.dumps(content | {"backbone": content["backbone"] | {"model": str(other)}}))
    with pytest.raises(MismatchError, match="tuned on weights"):
        ListwiseReader.load(tmp_path / "reader", device="cpu")


def test_damaged_folders(tuned, tmp_path):
    with pytest.raises(DataFormatError, match="not a d2llm reader folder"):
        ListwiseReader.load(tmp_path / "nothing")
    tuned.save(tmp_path / "reader")
    weights = tmp_path / "reader" / "reader.safetensors"
    tensors = load_file(weights)
    for name in ("log_scale", "projection.0.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, weights)
        with pytest.raises(ModelError, match=r"does not fit its manifest .*; restore the reader's folder"):
            ListwiseReader.load(tmp_path / "reader", device="cpu")
    weights.write_bytes(b"")
    with pytest.raises(ModelError, match="restore the reader's folder"):
        ListwiseReader.load(tmp_path / "reader", device="cpu")
    manifest = tmp_path / "reader" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["student"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(DataFormatError, match="'student'"):
        ListwiseReader.load(tmp_path / "reader", device="cpu")


def test_what_cannot_be_read_is_refused(reader, tmp_path):
    with pytest.raises(MismatchError, match="have 5 dimensions, but this reader reads 6"):
        reader.rank(["the cat"], [np.zeros((3, 5), np.float32)])
    with pytest.raises(InputError, match=f"at most {MAX_TOKENS} tokens"):
        reader.rank(["the cat"], [np.zeros((MAX_TOKENS, VECTOR_DIM), np.float32)])
    with pytest.raises(MismatchError, match="made by another"):
        reader.require_student("another")
    reader.require_student("a-student")
    with pytest.raises(InputError, match="not a causal language model"):
        new_reader(write_tiny_model(tmp_path / "bert", "bert"))
