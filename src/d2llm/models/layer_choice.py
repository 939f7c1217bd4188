"""Which layers of a backbone a student can do without.

A layer that hardly turns the states of the tokens is nearly an identity: leaving it out changes little. Gromov et al.,
"The Unreasonable Ineffectiveness of the Deeper Layers", 2024 (arXiv 2403.17887), drop the block of layers whose input
and output differ least; Fischer et al., "Large Language Models Are Overparameterized Text Encoders", 2024 (arXiv
2410.14578), drop the last ones, which ``backbone.layers = N`` does. Yang et al., "Entropy-Based Block Pruning for
Efficient Large Language Models", 2025 (arXiv 2504.03794, EntroDrop), drop the layers that add least to the entropy of
the states. Measured here (docs/recipes.md): the first is right for encoders that were trained for similarity, the
second for language models, whose last layers turn to the next word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from d2llm.core.batches import batched
from d2llm.core.errors import InputError
from d2llm.models.backbone import Backbone
from d2llm.models.pretrained import layers_of

_BATCH = 16
_MAX_TOKENS, _NEIGHBOUR = 2_000, 25  # for the entropy; the nearest states but 24, as in the published code
_SAME = 1e-10


def layer_distances(backbone: Backbone, texts: Sequence[str]) -> list[float]:
    """How far each layer turns the tokens' states: the mean angle between input and output, in half turns (0 to 1).

    Args:
        backbone: a backbone with all its layers.
        texts: some typical passages; a hundred are enough.

    Raises:
        InputError: there are no texts.
        ModelError: the model has no single list of layers.
    """
    sums, num_tokens = torch.zeros(backbone.num_layers, dtype=torch.float64), 0
    for states in _states_between_layers(backbone, texts):
        for index, (before, after) in enumerate(pairwise(states)):
            cosines = torch.cosine_similarity(before, after, dim=1).clamp(-1, 1)
            sums[index] += float((cosines.arccos() / torch.pi).sum())
        num_tokens += len(states[0])
    return (sums / num_tokens).tolist()


def entropy_gains(backbone: Backbone, texts: Sequence[str]) -> list[float]:
    """How much more entropy the states of the first 2,000 tokens have after each layer than before it, in nats.

    The entropy is estimated from the distances r of each state to its 25th nearest, as dim * mean log r and what is the
    same for all layers (EntroDrop). Arguments and errors are those of ``layer_distances``.
    """
    kept: list[list[Tensor]] = []
    num_tokens = 0
    for states in _states_between_layers(backbone, texts):
        kept.append(states)
        num_tokens += len(states[0])
        if num_tokens >= _MAX_TOKENS:
            break
    if num_tokens <= _NEIGHBOUR:
        raise InputError(f"{num_tokens} tokens are too few for an entropy; give a hundred passages")
    together = (torch.cat(states)[:_MAX_TOKENS] for states in zip(*kept, strict=True))
    entropies = [_entropy(states) for states in together]
    return [after - before for before, after in pairwise(entropies)]


def _entropy(states: Float[Tensor, "tokens dim"]) -> float:
    distances = torch.cdist(states.double(), states.double())
    radii = distances.kthvalue(_NEIGHBOUR + 1, dim=1).values  # the nearest is the state itself
    return states.shape[1] * float((radii + _SAME).log().mean())


def _states_between_layers(backbone: Backbone, texts: Sequence[str]) -> Iterator[list[Float[Tensor, "tokens dim"]]]:
    """For each batch of texts, the states of its tokens before the first layer and after each."""
    backbone.require_tokens("choosing layers")
    layers = layers_of(backbone.model, name=backbone.config.model)
    return states_of(backbone, texts, layers, [layers[-1]])


def states_of(
    backbone: Backbone, texts: Sequence[str], inputs_of: Iterable[nn.Module], outputs_of: Iterable[nn.Module] = ()
) -> Iterator[list[Float[Tensor, "tokens _"]]]:
    """For each batch of texts, what its tokens are as inputs of modules of the model, then as outputs of others.

    Raises:
        InputError: there are no texts.
    """
    if not texts:
        raise InputError("there are no texts to measure the layers on; give some passages")
    states: list[Tensor] = []

    def keep_input(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def keep_output(_: Any, __: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_pre_hook(keep_input, with_kwargs=True) for module in inputs_of]
    hooks += [module.register_forward_hook(keep_output) for module in outputs_of]
    try:
        for batch in batched(texts, _BATCH):
            states.clear()
            with torch.inference_mode():
                _, mask = backbone(*backbone.pad(backbone.tokenize(batch, "passage").ids))
                real = [state.reshape(*mask.shape, -1)[mask].float() for state in states]
            yield real
    finally:
        for hook in hooks:
            hook.remove()


def choose_layers(distances: Sequence[float], count: int) -> tuple[int, ...]:
    """The ``count`` layers with the largest distances or gains, in ascending order, for ``backbone.layers``.

    Raises:
        InputError: the model has fewer layers, or ``count`` is below 1.
    """
    if not 1 <= count <= len(distances):
        raise InputError(f"{count} layers cannot be kept of {len(distances)}; give a number from 1 to {len(distances)}")
    by_distance = sorted(range(len(distances)), key=lambda index: (-distances[index], index))
    return tuple(sorted(by_distance[:count]))
