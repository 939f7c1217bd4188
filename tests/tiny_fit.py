"""Documents, a writer on a local port and settings for fits of a few seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from d2llm.fitting.critic import CriticSettings
from d2llm.fitting.settings import FitSettings
from d2llm.recipe import WriterConfig, WriterEndpointConfig
from local_endpoint import Reply, Request, chat
from tiny_models import TEXTS

NUM_DOCUMENTS = 40
_WORDS = sorted({word for text in TEXTS for word in text.replace(",", "").split()})


def write_documents(folder: Path, number: int = NUM_DOCUMENTS) -> Path:
    """Documents of 14 random words and a name of their own."""
    rng = random.Random(5)
    folder.mkdir(parents=True)
    for document in range(number):
        words = rng.sample(_WORDS, 14)
        text = (
            f"# Device {document}\n\nThe zorb{document} is about {' '.join(words[:7])}. It has {' '.join(words[7:])}.\n"
        )
        (folder / f"{document}.md").write_text(text)
    return folder


def ask_about_passage(request: Request, number: int) -> Reply:
    """A chat answer: two queries of words from the passage in the prompt, in another order."""
    del number
    passage = request.prompt.rpartition("zorb")[2].replace(".", " ").split()
    first, second = (
        f"which zorb{passage[0]} has {passage[4]} {passage[3]}",
        f"zorb{passage[0]} {passage[8]} {passage[5]}",
    )
    return Reply(chat(f"1. {first}\n2. {second}\n", usage=(50, 9)))


def settings_for(student: Path, url: str, **changes: Any) -> FitSettings:
    writer = WriterConfig(kind="remote", model="served", remote=WriterEndpointConfig(url=url))
    values: dict[str, Any] = {"student": str(student), "writer": writer, "kinds": {"question": 1.0}, "hours": 1.0}
    return FitSettings(**values | {"critic": CriticSettings(depth=NUM_DOCUMENTS)} | changes)
