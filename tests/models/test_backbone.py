from __future__ import annotations

import json

import pytest
import torch
from transformers import BartConfig, BartModel, T5Config, T5Model

from d2llm.core.errors import InputError, ModelError
from d2llm.models.backbone import Backbone
from d2llm.models.pretrained import layers_of
from d2llm.recipe import BackboneConfig, Pooling
from tiny_models import ARCHITECTURES, DECODERS, TEXTS, randomise, tiny_tokenizer, write_tiny_model

LONG = " ".join(TEXTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(root / name, name) for name in ("llama", "bert", "xlm_roberta")}


def load(folder, pooling=None, **settings) -> Backbone:
    config = BackboneConfig(model=str(folder), **settings)
    return Backbone.load(config, pooling, device="cpu", dtype="float32")


# --- tokens


def test_truncation_is_counted_and_keeps_the_closing_token(folders):
    backbone = load(folders["bert"], max_query_tokens=8, max_passage_tokens=16)
    queries = backbone.tokenize([LONG, "the cat", LONG], "query")
    assert queries.num_truncated == 2
    assert queries.lengths[0] == queries.lengths[2] == 8
    assert [ids[0] for ids in queries.ids] == [1, 1, 1]
    assert [ids[-1] for ids in queries.ids] == [2, 2, 2]
    passages = backbone.tokenize([LONG, "the cat"], "passage")
    assert passages.lengths[0] == 16
    assert passages.ids[0][:7] == queries.ids[0][:7]
    assert passages.ids[1] == queries.ids[1]


def test_a_text_exactly_at_the_limit_is_not_truncated(folders):
    exact = len(tiny_tokenizer()(TEXTS[0])["input_ids"])
    for limit, cut in ((exact, 0), (exact - 1, 1)):
        assert load(folders["llama"], max_query_tokens=limit).tokenize([TEXTS[0]], "query").num_truncated == cut


def test_prefixes_are_prepended(folders):
    backbone = load(folders["llama"], query_prefix="the cat ", passage_prefix="a dog ")
    plain = load(folders["llama"])
    assert backbone.tokenize(["sat"], "query").ids == plain.tokenize(["the cat sat"], "query").ids
    assert backbone.tokenize(["sat"], "passage").ids == plain.tokenize(["a dog sat"], "passage").ids


def test_no_texts_and_empty_texts(folders, tmp_path):
    backbone = load(folders["llama"])
    assert backbone.tokenize([], "query").ids == []
    assert backbone.tokenize([""], "query").ids == [[1]]
    without_specials = write_tiny_model(tmp_path / "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(without_specials)
    reloaded = load(without_specials)
    assert reloaded.tokenize(["", "the"], "query").lengths == [1, 1]


def test_a_single_string_is_rejected(folders):
    with pytest.raises(InputError, match="put it in a list"):
        load(folders["llama"]).tokenize("the cat", "query")


@pytest.mark.parametrize("architecture", ["llama", "bert", "xlm_roberta"])
def test_limits_beyond_the_models_are_rejected(folders, architecture):
    load(folders[architecture], max_passage_tokens=512)
    with pytest.raises(InputError, match=r"max_passage_tokens is 513, but .* reads at most 512 tokens; set .* 512"):
        load(folders[architecture], max_passage_tokens=513)


def test_a_text_at_the_models_limit_is_encoded(folders):
    for folder in folders.values():
        backbone = load(folder, max_passage_tokens=512)
        ids = backbone.tokenize([LONG * 10], "passage").ids
        assert len(ids[0]) == 512
        states, _ = backbone(*backbone.pad(ids))
        assert torch.isfinite(states).all()


# --- states


def test_states_are_the_models_own(folders):
    backbone = load(folders["llama"])
    ids = backbone.tokenize(TEXTS[:1], "query").ids
    with torch.inference_mode():
        expected = backbone.model(input_ids=torch.tensor(ids)).last_hidden_state
        states, mask = backbone(*backbone.pad(ids))
    torch.testing.assert_close(states[mask], expected[0], rtol=1e-5, atol=1e-5)
    assert states.shape[-1] == backbone.dim == 32


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "t5"])
def test_layers_keeps_only_the_first_ones(tmp_path, architecture):
    folder = write_tiny_model(tmp_path / architecture, architecture)
    whole, cut = load(folder), load(folder, layers=1)
    total = whole.model.config.num_hidden_layers
    assert total > 1
    ids = whole.tokenize(TEXTS[:1], "query").ids
    states: list[torch.Tensor] = []
    layers = next(part for part in whole.model.modules() if isinstance(part, torch.nn.ModuleList))
    layers[0].register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
    norms = [part for name, part in whole.model.named_children() if "norm" in name and "embed" not in name]
    with torch.inference_mode():
        whole.model(input_ids=torch.tensor(ids))
        actual, mask = cut(*cut.pad(ids))
        expected = norms[-1](states[0]) if norms else states[0]
    torch.testing.assert_close(actual[mask], expected.reshape(-1, expected.shape[-1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=f"layers is 9, but .* has {total}"):
        load(folder, layers=9)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "t5"])
def test_layers_may_name_those_to_keep(tmp_path, architecture):
    """The model without its first layer, as the model itself computes it with a layer that does nothing."""
    folder = write_tiny_model(tmp_path / architecture, architecture)
    whole = load(folder)
    total = whole.model.config.num_hidden_layers
    cut = load(folder, layers=tuple(range(1, total)))
    assert cut.model.config.num_hidden_layers == total - 1
    layers = layers_of(whole.model, name="whole")
    layers[0].register_forward_hook(
        lambda _, args, kwargs, out: (
            (args[0] if args else kwargs["hidden_states"], *out[1:])
            if isinstance(out, tuple)
            else (args[0] if args else kwargs["hidden_states"])
        ),
        with_kwargs=True,
    )
    ids = whole.pad(whole.tokenize(TEXTS[:3], "query").ids)
    with torch.inference_mode():
        (expected, mask), (actual, _) = whole(*ids), cut(*ids)
    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=f"names layer 9, but .* has only layers 0 to {total - 1}"):
        load(folder, layers=(0, 9))


def test_no_key_value_cache_is_returned(folders):
    assert load(folders["llama"]).model(input_ids=torch.tensor([[1, 5]])).past_key_values is None


# --- own pooling


def test_pooling_follows_the_kind_of_model(tmp_path, folders):
    assert load(folders["bert"]).own_pooling.kind == "mean"
    assert load(folders["bert"], Pooling(kind="first")).own_pooling.kind == "first"
    for architecture in DECODERS[:3]:
        assert load(write_tiny_model(tmp_path / architecture, architecture)).own_pooling.kind == "last"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls"}, "first"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"pooling_mode": "weightedmean"}, "weighted_mean"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
    ],
)
def test_pooling_follows_the_models_own_setting(tmp_path, settings, expected):
    folder = write_tiny_model(tmp_path / "bert", "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert load(folder).own_pooling.kind == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max"),
        ({"pooling_mode": ["cls", "mean"]}, "cls and mean"),
        ({}, "nothing"),
    ],
)
def test_a_pooling_that_no_backbone_has_must_be_replaced_by_hand(tmp_path, settings, named):
    folder = write_tiny_model(tmp_path / "bert", "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=f"is pooled by {named}, which is none of"):
        load(folder)
    assert load(folder, Pooling(kind="mean")).own_pooling.kind == "mean"


# --- training


def count_trainable(backbone: Backbone) -> dict[str, int]:
    names = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    return {"adapter": sum("lora_" in name for name in names), "weights": sum("lora_" not in name for name in names)}


def test_tuning_decides_which_weights_are_trainable(folders):
    for tuning in ("lora", "full", "frozen"):
        backbone = load(folders["llama"], tuning=tuning)
        assert count_trainable(backbone) == {"adapter": 0, "weights": 0}
        backbone.prepare_training()
        trainable = count_trainable(backbone)
        assert (trainable["adapter"] > 0) == (tuning == "lora")
        assert (trainable["weights"] > 0) == (tuning == "full")
    assert backbone.tuned_state() == {}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("merge", [True, False])
def test_tuned_state_can_be_transferred(folders, tuning, merge):
    backbone = load(folders["llama"], tuning=tuning)
    backbone.prepare_training()
    randomise(backbone, scale=0.05)
    other = load(folders["llama"], tuning=tuning)
    if not merge:
        other.prepare_training(seed=3)
    other.load_tuned_state(backbone.tuned_state(), merge=merge)
    inputs = backbone.pad(backbone.tokenize(TEXTS[:2], "query").ids)
    with torch.inference_mode():
        expected, actual = backbone(*inputs)[0], other(*inputs)[0]
        assert not torch.allclose(load(folders["llama"])(*inputs)[0], expected, atol=1e-2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert {k: v.shape for k, v in other.tuned_state().items()} == {
        k: v.shape for k, v in backbone.tuned_state().items()
    }


def test_full_weights_of_another_model_are_rejected(folders):
    state = load(folders["bert"], tuning="full").tuned_state()
    with pytest.raises(ModelError, match="tuned weights do not fit"):
        load(folders["llama"], tuning="full").load_tuned_state(state, merge=True)


def test_full_tuning_keeps_float32_weights(folders):
    for tuning, dtype in (("full", torch.float32), ("lora", torch.bfloat16)):
        backbone = Backbone.load(BackboneConfig(model=str(folders["llama"]), tuning=tuning), dtype="bfloat16")
        assert next(backbone.model.parameters()).dtype == dtype
        states, mask = backbone(*backbone.pad([[1, 5, 6]]))
        assert backbone.pool(states, mask).dtype == torch.float32


def test_the_encoder_of_a_t5_model_is_a_backbone(tmp_path):
    """Sentence-T5: of a whole T5 model only the encoder is used, with the mean of its tokens."""
    sizes = {"vocab_size": 400, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_heads": 4}
    model = T5Model(T5Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer(is_decoder=False).save_pretrained(tmp_path)
    backbone = load(tmp_path)
    assert backbone.own_pooling.kind == "mean"
    assert not any("decoder" in name for name, _ in backbone.model.named_parameters())
    ids = backbone.tokenize(TEXTS[:1], "query").ids
    with torch.inference_mode():
        expected = model.encoder(input_ids=torch.tensor(ids)).last_hidden_state
        states, mask = backbone(*backbone.pad(ids))
    torch.testing.assert_close(states[mask], expected[0], rtol=1e-5, atol=1e-6)
    assert load(tmp_path, layers=(0, 2)).model.config.num_hidden_layers == 2
    with pytest.raises(InputError, match=r"layers leaves out layer 0 of .* which has the positions"):
        load(tmp_path, layers=(1, 2))


def test_another_encoder_decoder_is_rejected(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartModel(BartConfig(vocab_size=400, **sizes, **heads)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"an encoder-decoder model \(BartModel\)"):
        load(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "gpt_neox"])
def test_a_bidirectional_decoder_sees_what_follows_with_every_attention(tmp_path, architecture):
    folder = write_tiny_model(tmp_path / architecture, architecture)
    plain = Backbone.load(BackboneConfig(model=str(folder)), device="cpu", dtype="float32")
    backbone = Backbone.load(BackboneConfig(model=str(folder), bidirectional=True), device="cpu", dtype="float32")
    assert (plain.own_pooling.kind, backbone.own_pooling.kind) == ("last", "mean")
    ids = [[1, 10, 11, 12], [1, 10, 11, 13], [1, 10]]
    outputs = {}
    for attention in ("sdpa", "eager") if architecture != "gemma2" else ("eager",):
        backbone.model.set_attn_implementation(attention)
        with torch.no_grad():
            alone = [backbone(*backbone.pad([row]))[0][0] for row in ids]  # no padding: there may be no mask
            together = backbone(*backbone.pad(ids))[0]
        assert not torch.allclose(alone[0][0], alone[1][0], atol=1e-3)
        for one, row in zip(alone, together, strict=True):
            torch.testing.assert_close(one, row[: len(one)], atol=1e-4, rtol=1e-4)
        outputs[attention] = together
    for each in outputs.values():
        torch.testing.assert_close(each[:2], outputs["eager"][:2], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        before = [plain(*plain.pad([row]))[0][0] for row in ids]
    torch.testing.assert_close(before[0][0], before[1][0])


def test_an_encoder_is_not_made_bidirectional(tmp_path):
    folder = write_tiny_model(tmp_path / "bert", "bert")
    with pytest.raises(InputError, match="is no decoder: its tokens attend to all others already"):
        Backbone.load(BackboneConfig(model=str(folder), bidirectional=True), device="cpu", dtype="float32")
