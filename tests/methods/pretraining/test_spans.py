"""coCondenser, CoT-MAE and DeCLUTR: spans of a text, what is compared and what is reconstructed, by hand."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from d2llm.core.errors import InputError
from d2llm.methods.pretraining.cocondenser import contrast_of_spans, halves
from d2llm.methods.pretraining.declutr import DeCLUTR, draw_spans
from d2llm.methods.pretraining.retromae import sample
from d2llm.models.student import Student
from d2llm.recipe import Pretraining
from d2llm.training import pretrain
from methods.pretraining.test_condenser import new_run
from tiny_models import TEXTS, tiny_student_config, write_tiny_model

KINDS = ("cocondenser", "cot_mae", "declutr")


@pytest.mark.parametrize(
    ("ids", "first", "second"),
    [
        ([1, 11, 12, 13, 2], [1, 11, 12, 2], [1, 13, 2]),
        ([1, 11, 12, 13, 14, 2], [1, 11, 12, 2], [1, 13, 14, 2]),
        ([11, 12], [11], [12]),
        ([1, 11, 2], [1, 11, 2], [1, 11, 2]),
        ([1, 2], [1, 2], [1, 2]),
    ],
)
def test_both_halves_stand_between_the_special_tokens(ids: list[int], first: list[int], second: list[int]) -> None:
    assert halves(ids, {1, 2}) == (first, second)


def test_a_span_looks_for_its_other_half_among_all_spans() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 4))
    expected = 0.0
    for span, partner in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)):
        others = [vectors[span] @ vectors[other] for other in range(6) if other != span]
        expected += (np.log(np.exp(others).sum()) - vectors[span] @ vectors[partner]) / 6
    assert float(contrast_of_spans(torch.tensor(vectors))) == pytest.approx(expected, rel=1e-5)


def test_cocondenser_adds_the_contrast_to_what_condenser_learns_of_the_halves(tmp_path: Path) -> None:
    run = new_run(tmp_path, kind="cocondenser")
    task, batch = run.task, run.texts[:5]
    run.backbone.eval()
    task.decoder.eval()
    task.batches = lambda spans: [[index] for index in reversed(range(len(spans)))]  # read in another order
    hooks = task.hooks()
    with torch.no_grad():
        (found,) = task.losses(batch, random.Random(0))
        vectors = torch.cat([*reversed(task.vectors)])
        spans = [span for ids in batch for span in halves(ids, task.special)]
        condensed = sum(super(type(task), task).losses(spans, random.Random(0)))
    for hook in hooks:
        hook.remove()
    assert float(found) == pytest.approx(float(condensed + contrast_of_spans(vectors)), rel=1e-5)


def test_cot_mae_reconstructs_a_half_from_the_vector_of_the_other(tmp_path: Path) -> None:
    run = new_run(tmp_path, kind="cot_mae")
    task, backbone, rng = run.task, run.backbone, random.Random(0)
    backbone.eval()
    task.decoder.eval()
    spans = halves(run.texts[0], task.special)
    words = [[place for place, token in enumerate(span) if token not in task.special] for span in spans]
    encoded, decoded = ([sample(places, rate, rng) for places in words] for rate in (0.3, 0.45))
    embeddings, expected = backbone.model.get_input_embeddings().weight, 0.0

    def hidden(half: int, places: list[int]) -> torch.Tensor:
        return torch.tensor([[task.mask_id if n in places else token for n, token in enumerate(spans[half])]])

    def missed(states: torch.Tensor, half: int, places: list[int]) -> float:
        logits = task.decoder.to_words(states[0, places]) @ embeddings.T
        return float(functional.cross_entropy(logits, torch.tensor(spans[half])[places], reduction="sum"))

    with torch.no_grad():
        for half, other in ((0, 1), (1, 0)):
            read = hidden(half, encoded[half])
            mask = torch.ones_like(read, dtype=torch.bool)
            states = backbone.model(input_ids=read, attention_mask=mask.long()).last_hidden_state
            vector = backbone.own_pooling.pool(states, mask)
            tokens = backbone.model.embeddings(input_ids=hidden(other, decoded[other]))
            decoder_states = torch.cat([vector[:, None], tokens[:, 1:]], dim=1)
            for layer in task.decoder.layers.layers:
                decoder_states = layer(decoder_states)
            expected += missed(states, half, encoded[half]) / sum(map(len, encoded))
            expected += missed(decoder_states, other, decoded[other]) / sum(map(len, decoded))
        found = sum(float(loss) for loss in task.losses([run.texts[0]], random.Random(0)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_positives_overlap_the_anchor_or_touch_it() -> None:
    config = DeCLUTR(shortest_span=0.1, longest_span=0.4, positives=3)
    ids, rng, lengths, kinds = [1, *range(10, 50), 2], random.Random(0), ([], []), set()
    for _ in range(400):
        anchor, *positives = draw_spans(ids, {1, 2}, config, rng)
        for span in (anchor, *positives):
            assert (span[0], span[-1]) == (1, 2)
            assert span[1:-1] == [*range(span[1], span[1] + len(span) - 2)]
            assert 4 <= len(span) - 2 <= 16
        for span in positives:
            assert anchor[1] <= span[-2] + 1
            assert span[1] <= anchor[-2] + 1
            common = {*anchor} & {*span} - {1, 2}
            kinds.add("adjacent" if not common else "subsumed" if common == {*span[1:-1]} else "overlapping")
        lengths[0].append(len(anchor) - 2)
        lengths[1].extend(len(span) - 2 for span in positives)
    assert kinds == {"adjacent", "subsumed", "overlapping"}
    # Means of Beta(4, 2) and Beta(2, 4) are 2/3 and 1/3; lengths are rounded down.
    assert [np.mean(drawn) for drawn in lengths] == [pytest.approx(4 + 12 * p - 0.5, abs=0.4) for p in (2 / 3, 1 / 3)]


def test_declutr_compares_an_anchor_with_the_mean_of_its_positives(tmp_path: Path) -> None:
    run = new_run(tmp_path, kind="declutr", temperature=0.1)
    task, backbone, texts, rng = run.task, run.backbone, run.texts[:3], random.Random(0)
    backbone.eval()
    spans = [draw_spans(ids, task.special, task.config, rng) for ids in texts]
    words = [[place for place, token in enumerate(span[0]) if token not in task.special] for span in spans]
    masked = [sample(places, 0.15, rng) for places in words]
    embeddings, missed, vectors = backbone.model.get_input_embeddings().weight, 0.0, []
    task.batches = lambda batch: [[index] for index in reversed(range(len(batch)))]  # read in another order
    with torch.no_grad():
        (found,) = task.losses(texts, random.Random(0))
        for (anchor, *positives), places in zip(spans, masked, strict=True):
            read = [task.mask_id if place in places else token for place, token in enumerate(anchor)]
            states = [backbone.model(input_ids=torch.tensor([ids])).last_hidden_state for ids in (read, *positives)]
            one, *others = (
                backbone.own_pooling.pool(one, torch.ones(one.shape[:2], dtype=torch.bool)) for one in states
            )
            vectors += [one[0], torch.cat(others).mean(dim=0)]
            logits = task.decoder.to_words(states[0][0, places]) @ embeddings.T
            missed += float(functional.cross_entropy(logits, torch.tensor(anchor)[places], reduction="sum"))
    unit = functional.normalize(torch.stack(vectors), dim=1).double()
    expected = missed / sum(map(len, masked))
    for index in range(6):
        cosines = [float(unit[index] @ unit[other]) / 0.1 for other in range(6) if other != index]
        expected += (np.log(np.exp(cosines).sum()) - float(unit[index] @ unit[index ^ 1]) / 0.1) / 6
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_and_leaves_no_hooks(kind: str, tmp_path: Path) -> None:
    run = new_run(tmp_path, kind=kind, epochs=12)
    run.train()
    first, last = run.trainer.mean_losses
    assert last < 0.95 * first
    assert not any(module._forward_hooks for module in run.backbone.model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_needed(kind: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "bert")
    student = Student.create(tiny_student_config(model, tuning="full"), device="cpu", dtype="float32")
    with pytest.raises(InputError, match=f"{kind} .*use an encoder such as minilm"):
        pretrain.pretrain_backbone(student, TEXTS, tmp_path / "run", Pretraining.of(kind))
