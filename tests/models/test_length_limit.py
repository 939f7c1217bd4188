from __future__ import annotations

from transformers import AutoModel

from d2llm.models.length_limit import readable_tokens
from d2llm.models.sources import load_pretrained
from tiny_models import write_tiny_model


def test_readable_tokens(tmp_path):
    for architecture, expected in (("llama", 512), ("bert", 512), ("xlm_roberta", 512)):
        model = load_pretrained(AutoModel, str(write_tiny_model(tmp_path / architecture, architecture)))
        assert readable_tokens(model.config) == expected
