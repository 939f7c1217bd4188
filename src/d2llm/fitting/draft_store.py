"""The queries that a writer has written, in a file that grows line by line, so that no answer is paid for twice.

Each line is the answer for one passage and one kind of query, under the hash of the passage's text. When documents
change, the queries of unchanged passages are still there, and those of others are left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2llm.core.errors import DataFormatError
from d2llm.core.types import Passage
from d2llm.models.writers.writer import QueryKind

DraftKey = tuple[str, str]
"""Hash of a passage's text, kind of query."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A writer's answer for one passage and kind: queries that no rule or critic has looked at yet.

    ``problem`` says why an answer could not be parsed; tokens are those of this answer.
    """

    passage_hash: str
    kind: QueryKind
    queries: tuple[str, ...]
    num_prompt_tokens: int
    num_written_tokens: int
    problem: str | None = None

    @property
    def key(self) -> DraftKey:
        """What identifies it in the store of one writer."""
        return self.passage_hash, self.kind


def passage_hash(passage: Passage) -> str:
    """Hash of a passage's title and text."""
    return hashlib.blake2b(passage.full_text.encode(errors="surrogatepass"), digest_size=12).hexdigest()


class DraftStore:
    """The drafts of one writer (fingerprint) in a folder; a line that an interruption left unfinished is dropped."""

    def __init__(self, folder: Path, writer: str) -> None:
        """Open a store.

        Args:
            folder: its folder, created if need be.
            writer: fingerprint of the writer.

        Raises:
            DataFormatError: a line, other than an unfinished last one, is not a draft.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"drafts-{writer}.jsonl"
        self._drafts: dict[DraftKey, Draft] = {}
        self.num_tokens = 0, 0
        """Tokens of all prompts, and all tokens written."""
        if self.path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._drafts)

    def __contains__(self, key: DraftKey) -> bool:
        return key in self._drafts

    def get(self, key: DraftKey) -> Draft | None:
        """The draft with this key, if there is one."""
        return self._drafts.get(key)

    def of(self, passage_hashes: Collection[str]) -> list[Draft]:
        """The drafts for some passages, of every kind."""
        return [draft for draft in self._drafts.values() if draft.passage_hash in passage_hashes]

    def add(self, drafts: Iterable[Draft]) -> None:
        """Append drafts to the file and wait until they are on the disk."""
        added = list(drafts)
        lines = "".join(json.dumps(asdict(draft), ensure_ascii=False) + "\n" for draft in added)
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        for draft in added:
            self._remember(draft)

    def _read(self) -> None:
        content = self.path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            with self.path.open("r+b") as file:
                file.truncate(complete)
        for line_number, line in enumerate(content[:complete].splitlines(), start=1):
            try:
                values: dict[str, Any] = json.loads(line)
                values["queries"] = tuple(values["queries"])
                draft = Draft(**values)
            except (ValueError, TypeError, KeyError) as error:
                problem = f"is not a written query ({error}); delete the line, and it will be written again"
                raise DataFormatError(self.path, problem, line=line_number) from error
            self._remember(draft)

    def _remember(self, draft: Draft) -> None:
        self._drafts[draft.key] = draft
        num_read, num_written = self.num_tokens
        self.num_tokens = num_read + draft.num_prompt_tokens, num_written + draft.num_written_tokens
