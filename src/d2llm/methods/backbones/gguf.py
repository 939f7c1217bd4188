"""Models in GGUF files, the format of llama.cpp."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from d2llm.core.errors import ModelError
from d2llm.core.extras import require
from d2llm.models.sources import first_sentence
from d2llm.recipe import BackboneConfig


class GGUF(BackboneConfig, kind="gguf"):
    """A decoder in a GGUF file of llama.cpp, recognised by its suffix."""

    measured = "not measured: it is as good as its model; `smollm2` is one"
    costs = "the extra gguf; the file is converted once, to float32 weights in your cache folder"

    @classmethod
    def convert(cls, path: Path, folder: Path) -> None:
        require("gguf", extra="gguf", purpose="reading a GGUF model")
        try:
            _convert(path, folder)
        except Exception as error:  # libraries raise errors of any kind about files that are not what they expect
            raise ModelError(
                f"{path}: cannot be read as a GGUF model ({first_sentence(error)}); use another file, or the model's "
                "folder of safetensors"
            ) from error


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, output_loading_info=True
    )
    quantised, report = read
    if missing := sorted(report["missing_keys"]):  # they would be random
        raise ValueError(f"it lacks {len(missing)} weights: {', '.join(missing[:3])}")
    config = copy.deepcopy(quantised.config)
    # A model loaded from a GGUF file cannot be saved while its configuration says that it is quantised.
    vars(config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
