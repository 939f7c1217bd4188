"""Run Schemathesis against a real server: no 500, and no answer that its OpenAPI description does not list.

`fuzz_hooks.py` also sends unpaired surrogates wherever a body has text.

It does not check that every body which fits the schema is accepted: a JSON schema cannot describe filters, fields that
exclude each other, and ids that do not exist.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from d2llm import Index, Passage

HOOKS = Path(__file__).resolve().with_name("fuzz_hooks.py")
TEXT = "iterating over an open file gives its lines, sockets send bytes, a list is sorted by a key"


def main() -> int:
    """Start a server, run Schemathesis and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=50, help="examples per operation")
    parser.add_argument("--seconds", type=int, default=600, help="time limit for all operations")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index = Index.create(Path(folder) / "index", "d2llm-minilm", metadata={"year": "integer"})
        index.upsert(
            Passage(str(n), TEXT[3 * n : 3 * n + 40], document_id=f"d{n // 3}", position=n % 3, metadata={"year": n})
            for n in range(12)
        )
        serve = [sys.executable, "-m", "d2llm", "serve", str(index.folder), "--port", "0"]
        with (
            (Path(folder) / "log").open("w+", encoding="utf-8") as log,
            subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=log, text=True) as server,
        ):
            try:
                assert server.stdout is not None
                ready = server.stdout.readline()
                if not ready:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read()}")
                address = next(word for word in ready.split() if word.startswith("http://"))
                return subprocess.call(
                    [
                        *(str(Path(sys.executable).with_name("st")), "run", f"{address}/openapi.json"),
                        *("--max-examples", str(arguments.examples), "--max-time", str(arguments.seconds)),
                        *("--seed", str(arguments.seed), "--exclude-checks", "positive_data_acceptance"),
                        *("--continue-on-failure", "--generation-database", "none"),
                    ],
                    env=os.environ | {"NO_COLOR": "1", "SCHEMATHESIS_HOOKS": str(HOOKS)},
                    cwd=folder,
                )
            finally:
                server.terminate()


if __name__ == "__main__":
    sys.exit(main())
