"""Teachers in fewer bits or over several devices. What needs bitsandbytes runs on a CPU too, if it is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from d2llm.core.errors import InputError, MissingExtraError, ModelError
from d2llm.models.device import checkpoint_layers
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.local import require_on_devices
from d2llm.models.teachers.pair_teacher import identify_teacher, load_teacher
from d2llm.recipe import LoraConfig, TeacherConfig
from tiny_models import TEXTS, randomise, tiny_teacher_config, write_tiny_model

PAIRS = [(query, passage) for query in TEXTS[:2] for passage in TEXTS[:4]]
TASK = "asymmetric"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def full(llama: Path) -> CausalTeacher:
    return CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")


def bits(number: int) -> dict[str, Any]:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'd2llm[large]'")
    return {"quantization": f"{number}bit"}


def test_a_spread_teacher_judges_alike(llama: Path, full: CausalTeacher) -> None:
    """On a machine without GPUs, all of it is on the CPU."""
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'd2llm[large]'")
    spread = load_teacher(tiny_teacher_config(llama, device_map="auto"), dtype="float32")
    assert spread.fingerprint == full.fingerprint
    np.testing.assert_allclose(
        spread.score_pairs(PAIRS, TASK).log_odds, full.score_pairs(PAIRS, TASK).log_odds, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_with_the_hooks_of_several_devices(llama: Path, full: CausalTeacher, checkpointing: bool) -> None:
    """What accelerate adds to the layers of a model on several GPUs works with shared prefixes and in training."""
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate: pip install 'd2llm[large]'")
    teacher = CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")
    model: Any = teacher.model
    for layer in (model.embed_tokens, *model.layers, model.norm):
        hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=False, place_submodules=True)
        hooks.add_hook_to_module(layer, hook)
    expected = full.score_pairs(PAIRS, TASK).log_odds
    np.testing.assert_allclose(teacher.score_pairs(PAIRS, TASK).log_odds, expected, rtol=0, atol=1e-5)
    assert teacher.why_not_shared() == ""
    teacher.prepare_training(LoraConfig(rank=2, dropout=0.0), gradient_checkpointing=checkpointing)
    teacher.train()
    log_odds = teacher(*teacher.pad(teacher.tokenize(PAIRS, TASK)[0]), TASK)[0]
    np.testing.assert_allclose(log_odds.detach().numpy(), expected, rtol=0, atol=1e-4)
    log_odds.sum().backward()
    assert all(p.grad is not None for name, p in teacher.named_parameters() if "lora_B" in name)


def test_a_spread_teacher_cannot_be_on_one_device(llama: Path) -> None:
    with pytest.raises(InputError, match=r"spread over all GPUs .* so it cannot be on cuda:1 alone; leave the device"):
        load_teacher(tiny_teacher_config(llama, device_map="auto"), device="cuda:1")


@pytest.mark.parametrize(
    ("device_map", "problem"),
    [
        ({"layers.0": 0, "layers.1": 1}, None),
        ({"": "cpu"}, None),
        ({"layers.0": 0, "layers.1": "cpu", "head": "disk"}, "would stay on cpu and disk. Use more GPUs"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(device_map: dict[str, Any], problem: str | None) -> None:
    whole = SimpleNamespace(hf_device_map=device_map)
    if problem is None:
        require_on_devices(whole, "large")
        return
    with pytest.raises(InputError, match=problem):
        require_on_devices(whole, "large")


def test_the_number_format_of_the_recipe_gives_way_to_that_of_the_command(llama: Path) -> None:
    config = tiny_teacher_config(llama, dtype="bfloat16")
    assert CausalTeacher.load(config, device="cpu").model.dtype == torch.bfloat16
    assert CausalTeacher.load(config, device="cpu", dtype="float32").model.dtype == torch.float32


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(llama: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf"a teacher in 4 bits needs .*{package}.*pip install .*d2llm\[large\]"
    ):
        load_teacher(tiny_teacher_config(llama, quantization="4bit"), device="cpu")


@pytest.mark.parametrize(("number", "correlation"), [(8, 0.99), (4, 0.7)])
def test_a_quantised_teacher_is_another_one_that_judges_similarly(llama, full, number: int, correlation: float):
    config = tiny_teacher_config(llama, **bits(number))
    teacher = CausalTeacher.load(config, device="cpu", dtype="float32")
    layers = {type(module).__name__ for module in teacher.model.modules() if isinstance(module, torch.nn.Linear)}
    assert layers == {"Linear8bitLt" if number == 8 else "Linear4bit"}
    scores, expected = (each.score_pairs(PAIRS, TASK, with_features=True) for each in (teacher, full))
    assert not np.allclose(scores.log_odds, expected.log_odds, atol=1e-4)
    assert np.corrcoef(scores.log_odds, expected.log_odds)[0, 1] > correlation
    assert scores.features is not None
    assert teacher.fingerprint == identify_teacher(config).fingerprint
    assert len({teacher.fingerprint, full.fingerprint, identify_teacher(tiny_teacher_config(llama)).fingerprint}) == 2
    assert teacher.why_not_shared() == ""


def test_all_weights_of_a_quantised_teacher_cannot_be_tuned(llama: Path) -> None:
    teacher = CausalTeacher.load(tiny_teacher_config(llama, **bits(4)), device="cpu", dtype="float32")
    with pytest.raises(InputError, match="full tuning needs float32 weights"):
        teacher.prepare_training(LoraConfig(), tuning="full")


@pytest.mark.parametrize("number", [8, 4])
def test_an_adapter_is_computed_beside_quantised_weights(tmp_path: Path, llama: Path, number: int) -> None:
    """A teacher tuned on quantised weights is loaded on them, unless the full ones are requested."""
    settings = bits(number)
    teacher = CausalTeacher.load(tiny_teacher_config(llama, **settings), device="cpu", dtype="float32")
    before = teacher.score_pairs(PAIRS, TASK).log_odds
    teacher.prepare_training(LoraConfig(rank=2, alpha=4.0))
    randomise(teacher.model, scale=0.2)
    teacher.eval()
    tuned = teacher.score_pairs(PAIRS, TASK).log_odds
    assert np.abs(tuned - before).max() > 0.5
    (tmp_path / "tuned").mkdir()
    teacher.save(tmp_path / "tuned", {})
    config = TeacherConfig(model=str(tmp_path / "tuned"))
    again = CausalTeacher.load(config, device="cpu", dtype="float32")
    assert again.quantization == settings["quantization"]
    assert again.fingerprint == teacher.fingerprint == identify_teacher(config).fingerprint
    np.testing.assert_allclose(
        again.score_pairs(PAIRS, TASK).log_odds, tuned, rtol=0, atol=0.05
    )  # CPU kernels round to bfloat16
    on_full = TeacherConfig(model=str(tmp_path / "tuned"), quantization="none")
    merged = CausalTeacher.load(on_full, device="cpu", dtype="float32")
    assert merged.fingerprint == identify_teacher(on_full).fingerprint != teacher.fingerprint
    assert np.corrcoef(merged.score_pairs(PAIRS, TASK).log_odds, tuned)[0, 1] > 0.6


def test_a_teacher_tuned_on_quantised_weights_can_be_tuned_again(tmp_path: Path, llama: Path) -> None:
    teacher = CausalTeacher.load(tiny_teacher_config(llama, **bits(4)), device="cpu", dtype="float32")
    for number in (1, 2):
        teacher.prepare_training(LoraConfig(rank=2, alpha=4.0))
        randomise(teacher.model, scale=0.2, seed=number)
        teacher.eval()
        expected = teacher.score_pairs(PAIRS, TASK).log_odds
        (tmp_path / str(number)).mkdir()
        teacher.save(tmp_path / str(number), {})
        config = TeacherConfig(model=str(tmp_path / str(number)))
        teacher = CausalTeacher.load(config, device="cpu", dtype="float32")
        np.testing.assert_allclose(
            teacher.score_pairs(PAIRS, TASK).log_odds, expected, rtol=0, atol=0.05
        )  # CPU kernels round to bfloat16
    ranks = {
        name.rpartition(".")[2]: tensor.shape
        for name, tensor in load_file(tmp_path / "2" / "adapter.safetensors").items()
    }
    assert ranks["lora_down"][0] == 4


def test_gradients_through_4_bit_weights_are_those_through_their_values(llama: Path) -> None:
    """Also after the teacher has scored, for which bitsandbytes may store the weights in another layout."""
    quantised = CausalTeacher.load(tiny_teacher_config(llama, **bits(4)), device="cpu", dtype="float32")
    plain = CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")
    from bitsandbytes.functional import dequantize_4bit

    layers = dict(quantised.model.named_modules())
    with torch.no_grad():
        for name, layer in plain.model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                stored: Any = layers[name].weight
                layer.weight.copy_(dequantize_4bit(stored.data, stored.quant_state))
    gradients: list[dict[str, torch.Tensor]] = []
    log_odds: list[np.ndarray] = []
    for teacher in (quantised, plain):
        teacher.prepare_training(LoraConfig(rank=2, alpha=4.0, dropout=0.0))
        randomise(teacher.model, scale=0.1)
        log_odds.append(teacher.score_pairs(PAIRS, TASK).log_odds)
        teacher.train()
        rows, _ = teacher.tokenize(PAIRS, TASK)
        teacher(*teacher.pad(rows), TASK)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in teacher.named_parameters() if p.grad is not None})
    np.testing.assert_allclose(*log_odds, rtol=1e-3, atol=1e-3)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


class TestGradientCheckpointing:
    def gradients(self, llama: Path, *, checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        """The gradients of the adapters, and the bytes that were kept for the backward pass."""
        teacher = CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")
        lora = LoraConfig(rank=2, alpha=4.0, dropout=0.3)
        teacher.prepare_training(lora, gradient_checkpointing=checkpointing)
        randomise(teacher.model, scale=0.1)
        teacher.train()
        rows, _ = teacher.tokenize(PAIRS, TASK)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = teacher(*teacher.pad(rows), TASK)[0].square().mean()
        num_bytes = sum(kept.values())
        loss.backward()
        parameters = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        assert len(gradients) == len(parameters)
        return gradients, num_bytes

    def test_gradient_is_the_same_in_less_memory(self, llama: Path) -> None:
        expected, all_bytes = self.gradients(llama, checkpointing=False)
        gradients, num_bytes = self.gradients(llama, checkpointing=True)
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)
        assert num_bytes < 0.3 * all_bytes

    def test_judging_is_unchanged(self, llama: Path, full: CausalTeacher) -> None:
        teacher = CausalTeacher.load(tiny_teacher_config(llama), device="cpu", dtype="float32")
        teacher.prepare_training(LoraConfig(), gradient_checkpointing=True)
        expected = full.score_pairs(PAIRS, TASK).log_odds
        np.testing.assert_allclose(teacher.score_pairs(PAIRS, TASK).log_odds, expected, rtol=1e-4, atol=1e-4)

    def test_a_model_without_such_layers_is_refused(self) -> None:
        with pytest.raises(ModelError, match="no layers that support gradient checkpointing"):
            checkpoint_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), "plain")
