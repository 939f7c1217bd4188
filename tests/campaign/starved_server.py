"""F7: a server that lacks open files or disk for a moment, while several clients ask and write.

What it answers meanwhile is right, or says what is lacking; no answer is a 500, and a connection may be refused. With
nothing lacking, everything is right again, and every write that was acknowledged is there. Without memory, libraries
end the process or wait for ever (docs/reliability.md), so that it is not among what lacks here.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.client import HTTPException
from pathlib import Path
from typing import Any

from attacked_server import AttackedServer
from campaign.changing_files import CHANGING, REQUESTS, Served, answer_of, essence
from campaign.frame import Draw, Outcome, Row, main, served_cases
from tiny_models import TEXTS

FILES, DISK = "open files", "disk"
KINDS = {FILES: resource.RLIMIT_NOFILE, DISK: resource.RLIMIT_FSIZE}
REFUSED = (429, 503, 507)
CLIENTS, ROUNDS = 6, 4
_MANY: tuple[tuple[str, Any], ...] = (
    ("/v1/embeddings", {"input": [" ".join(TEXTS[:2])] * 100, "model": "student-0"}),
    ("/rerank", {"query": "the cat", "texts": [" ".join(TEXTS[:2])] * 100}),
    ("/v1/search", {"query": "the cat", "top_k": 60, "exact": True}),
)
"""What takes longer than other requests."""


def _limit(pid: int, kind: str, chance: random.Random) -> tuple[int, int]:
    """Leave a running process little of something; returns the limits that it had."""
    before = resource.prlimit(pid, KINDS[kind])
    soft = {
        FILES: len([*Path(f"/proc/{pid}/fd").iterdir()]) + chance.randrange(4),
        DISK: int(10 ** chance.uniform(0, 6)),
    }
    resource.prlimit(pid, KINDS[kind], (soft[kind], before[1]))
    return before


class Starved(Served):
    """A server on an index, what it answers, and which passages clients know to be there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.known: dict[str, str] = {}
        self.num_writes = 0

    def _asked(self, name: str) -> str:
        """What is wrong with an answer."""
        try:
            if name in REQUESTS:
                status, body = answer_of(self.server, name)
            elif name == "write":
                return self._written()
            else:
                found = self.server.post(*_MANY[int(name)])
                status, body = found.status, found.body
        except (OSError, HTTPException):  # no connection, or it was cut off
            return ""
        if status == 200:
            is_same = name not in CHANGING or essence(name, body) == self.expected[name]
            return "" if is_same else f"{name}: another answer"
        return "" if status in REFUSED else f"{name}: {status} {str(body)[:300]}"

    def _written(self) -> str:
        """Write a passage that few searches of ``REQUESTS`` find."""
        self.num_writes += 1
        one = {"id": f"w{self.num_writes}", "text": f"zorb {self.num_writes}"}
        found = self.server.post("/v1/passages", {"passages": [one]})
        if found.status == 200:
            self.known[one["id"]] = one["text"]
        return "" if found.status in (200, *REFUSED) else f"a write: {found.status} {str(found.body)[:300]}"

    def _whole(self) -> list[str]:
        """What is wrong when nothing lacks any more."""
        wrong: list[str] = []
        for one, text in self.known.items():
            found = self.server.get(f"/v1/passages/{one}")
            if found.status != 200 or found.body["text"] != text:
                wrong.append(f"{one}, acknowledged: {found.status} {str(found.body)[:200]}")
        for number in range(self.num_writes):  # also those that were not acknowledged: one may be near to a query
            self.server.request("DELETE", f"/v1/passages/w{number + 1}")
        self.num_writes = 0
        self.known.clear()
        return wrong + [name for name in CHANGING if essence(name, self.right(name)) != self.expected[name]]

    def case(self, chance: random.Random) -> Outcome:
        kind = chance.choice([*KINDS])
        names = [chance.choice([*REQUESTS, "write", "write", "0", "1", "2"]) for _ in range(CLIENTS * ROUNDS)]
        before = _limit(self.server.process.pid, kind, chance)
        with ThreadPoolExecutor(CLIENTS) as clients:
            found = [problem for problem in clients.map(self._asked, names) if problem]
        if (status := self.server.process.poll()) is not None:
            said = self.server.stop()[2]
            found.append(f"the server ended with {status}: {said[-1_500:]}")
            self.server.close()
            self.server = AttackedServer(self.index, reload_seconds=0.2)
        else:
            resource.prlimit(self.server.process.pid, KINDS[kind], before)
        found += [f"afterwards: {problem}" for problem in self._whole()]
        return Outcome(f"little {kind}", "\n".join(found))


def prepare(folder: Path) -> AbstractContextManager[Callable[[Draw], Outcome]]:
    return served_cases(folder, Starved)


ROW = Row("starved_server", "F7", 20, prepare)

if __name__ == "__main__":
    main(ROW)
