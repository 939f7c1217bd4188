"""Which layers a backbone can do without: by angles between their inputs and outputs, or by entropy; students made of
the rest.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from d2llm.core.errors import InputError
from d2llm.methods.poolings.ditto import Ditto, choose_head
from d2llm.models.backbone import Backbone
from d2llm.models.layer_choice import choose_layers, entropy_gains, layer_distances
from d2llm.models.pretrained import layers_of
from d2llm.models.student import Student
from d2llm.recipe import BackboneConfig, Pooling
from tiny_models import TEXTS, tiny_student_config, write_tiny_model


def load(folder: Path, pooling: Pooling | None = None) -> Backbone:
    return Backbone.load(BackboneConfig(model=str(folder)), pooling, device="cpu", dtype="float32")


@pytest.mark.parametrize("architecture", ["bert", "llama", "modernbert"])
def test_distances_equal_the_angles_of_the_models_own_states(tmp_path: Path, architecture: str) -> None:
    backbone = load(write_tiny_model(tmp_path / architecture, architecture, num_hidden_layers=3))
    angles: list[list[float]] = []
    for text in TEXTS[:3]:
        ids = torch.tensor(backbone.tokenize([text], "passage").ids)
        states = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states
        for before, after in pairwise(states[:3]):  # some normalise the last one
            cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
            angles.append((cosine.clamp(-1, 1).arccos() / np.pi)[0].tolist())
    expected = [np.concatenate(angles[number::2]).mean() for number in range(2)]
    np.testing.assert_allclose(layer_distances(backbone, TEXTS[:3])[:2], expected, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_gains_of_entropy_by_the_distances_to_the_25th_nearest(tmp_path: Path, architecture: str) -> None:
    backbone = load(write_tiny_model(tmp_path / architecture, architecture, num_hidden_layers=3))
    states: list[list[np.ndarray]] = [[], [], []]
    for text in TEXTS:
        ids = torch.tensor(backbone.tokenize([text], "passage").ids)
        with torch.no_grad():
            hidden = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states
        for index in range(3):  # some normalise the last one
            states[index] += [*hidden[index][0].double().numpy()]
    entropies: list[float] = []
    for rows in map(np.stack, states):
        logarithms = [np.log(np.sort(np.linalg.norm(rows - row, axis=1))[25] + 1e-10) for row in rows]
        entropies.append(32 * np.mean(logarithms))
    np.testing.assert_allclose(entropy_gains(backbone, TEXTS)[:2], np.diff(entropies), rtol=1e-3)
    with pytest.raises(InputError, match="too few for an entropy"):
        entropy_gains(backbone, TEXTS[:1])


def test_a_layer_that_does_nothing_is_dropped_first(tmp_path: Path) -> None:
    backbone = load(write_tiny_model(tmp_path / "llama", "llama", num_hidden_layers=4))
    with torch.no_grad():
        for name, parameter in layers_of(backbone.model, name="llama")[2].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()  # nothing is added to the residual stream
    distances = layer_distances(backbone, TEXTS)
    assert distances[2] == pytest.approx(0.0, abs=1e-3)
    assert choose_layers(distances, 3) == (0, 1, 3)
    assert entropy_gains(backbone, TEXTS)[2] == pytest.approx(0.0, abs=1e-3)


def test_the_layers_that_turn_most_are_chosen() -> None:
    assert choose_layers([0.3, 0.1, 0.2, 0.3], 2) == (0, 3)
    assert choose_layers([0.3, 0.1], 2) == (0, 1)
    for count in (0, 3):
        with pytest.raises(InputError, match="from 1 to 2"):
            choose_layers([0.3, 0.1], count)


def test_no_texts_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no texts"):
        layer_distances(load(write_tiny_model(tmp_path / "bert", "bert")), [])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_student_of_chosen_layers_is_saved_and_loaded(tmp_path: Path, architecture: str, merge: bool) -> None:
    folder = write_tiny_model(tmp_path / architecture, architecture, num_hidden_layers=3)
    config = tiny_student_config(folder)
    backbone = config.backbone.model_copy(update={"layers": (0, 2)})
    student = Student.create(config.model_copy(update={"backbone": backbone}), device="cpu", dtype="float32")
    student.save(tmp_path / "student", merge=merge)
    loaded = Student.load(tmp_path / "student", device="cpu", dtype="float32")
    np.testing.assert_allclose(
        loaded.encode_queries(TEXTS).vectors, student.encode_queries(TEXTS).vectors, rtol=1e-5, atol=1e-6
    )
    assert loaded.config.backbone.layers == (0, 2)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_head_of_ditto_is_the_one_that_ranks_pairs_best(tmp_path: Path, architecture: str) -> None:
    folder = write_tiny_model(tmp_path / architecture, architecture)
    queries, passages = [text.upper() for text in TEXTS[:4]], TEXTS[:6]

    def reciprocal_rank(head: tuple[int, int]) -> float:
        backbone = load(folder, Ditto(layer=head[0], head=head[1]))
        vectors: list[np.ndarray] = []
        for text in (*queries, *passages):
            with torch.inference_mode():
                states, _ = backbone(*backbone.pad(backbone.tokenize([text], "passage").ids))
            mean = states[0].mean(dim=0).numpy()
            vectors.append(mean / np.linalg.norm(mean))
        scores = np.stack(vectors[:4]) @ np.stack(vectors[4:]).T
        ranks = [1 + int((row > row[number]).sum()) for number, row in enumerate(scores)]
        return float(np.mean([1 / rank for rank in ranks]))

    heads = [(layer, head) for layer in range(2) for head in range(4)]
    chosen = choose_head(load(folder, Ditto(layer=0, head=0)), queries, passages)
    assert reciprocal_rank((chosen.layer, chosen.head)) == pytest.approx(max(reciprocal_rank(head) for head in heads))


def test_a_head_is_not_chosen_without_attention_or_pairs(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "bert", "bert")
    with pytest.raises(InputError, match="only a backbone with the pooling 'ditto'"):
        choose_head(load(folder), TEXTS[:1], TEXTS[:1])
    backbone = load(folder, Ditto(layer=0, head=0))
    with pytest.raises(InputError, match="2 queries need as many passages or more, not 1"):
        choose_head(backbone, TEXTS[:2], TEXTS[:1])
