"""`d2llm mcp`, started and asked by the client of the official SDK."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("mcp", reason="needs the extra 'mcp'")

from markdown_it import MarkdownIt
from mcp import Client

from agent_clients import ask_program, call, program, refused
from d2llm import Index, Passage
from d2llm.core.toml import parse_toml
from d2llm.server.agent_tools import NOTICE
from e2e.command_line import PROGRAM, d2llm, fail, succeed
from tiny_server import tiny_passages, write_tiny_index
from waiting import PATIENCE

QUERY = "the cat by the sea"
READING = ["search", "read", "list_documents", "similar"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_index(tmp_path_factory.mktemp("mcp"), 24, "docs")


@pytest.mark.parametrize("mode", ["auto", pytest.param("legacy", marks=pytest.mark.rest)])
def test_an_agent_uses_every_tool_that_reads(index: Path, mode: str):
    async def work(client: Client) -> None:
        tools = (await client.list_tools()).tools
        assert [tool.name for tool in tools] == READING
        found = await call(client, "search", query=QUERY, top_k=3, filter="year >= 2003")
        best = found["sources"][0]["passage_ids"][0]
        assert found["notice"] == NOTICE
        part = await call(client, "read", passage_id=best)
        assert best in part["passage_ids"]
        whole = await call(client, "read", document_id=part["document_id"])
        assert part["text"] in whole["text"]
        alike = await call(client, "similar", passage_id=best, top_k=2)
        assert best not in {name for source in alike["sources"] for name in source["passage_ids"]}
        listed = await call(client, "list_documents")
        resources = (await client.list_resources()).resources
        assert [resource.name for resource in resources] == [document["id"] for document in listed["documents"]]
        (content,) = (await client.read_resource(f"d2llm:///docs/{part['document_id']}")).contents
        assert json.loads(content.text) == whole
        document = {"id": "new", "text": "a new text"}
        assert "does not allow" in await refused(client, "upsert", documents=[document])
        assert "query: the text is empty" in await refused(client, "search", query="")

    ask_program(work, index, mode=mode)


def test_a_client_may_write_only_if_its_user_says_so(tmp_path: Path):
    index = write_tiny_index(tmp_path, 8)
    day = datetime(2026, 11, 29, tzinfo=timezone.utc)
    Index.open(index, dtype="float32").upsert([Passage("dated", "a day", metadata={"day": day})])

    async def work(client: Client) -> None:
        assert [tool.name for tool in (await client.list_tools()).tools] == [*READING, "upsert", "delete"]
        (content,) = (await client.read_resource("d2llm:///index/dated")).contents
        assert json.loads(content.text) == await call(client, "read", document_id="dated")
        assert datetime.fromisoformat(json.loads(content.text)["metadata"]["day"].replace("Z", "+00:00")) == day
        assert (await call(client, "upsert", documents=[{"id": "größe", "text": "ein Haus 猫"}]))["num_added"] == 1
        assert (await call(client, "read", document_id="größe"))["text"] == "ein Haus 猫"
        assert (await call(client, "delete", document_id="d0"))["num_deleted"] == 4

    ask_program(work, index, "--writable", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["verb"], report["result"]["settings"]["writable"]) == ("mcp", True)
    opened = Index.open(index, dtype="float32")
    assert {document.id for document in opened.list_documents()} == {"d1", "dated", "größe"}


def test_two_clients_have_several_indexes_each_and_see_what_others_write(tmp_path: Path):
    first, second = write_tiny_index(tmp_path, 8, "first"), write_tiny_index(tmp_path, 12, "second")
    folders = (f"eins={first}", second)

    async def work() -> None:
        async with Client(program(*folders)) as one, Client(program(*folders)) as two:
            tools = (await one.list_tools()).tools
            assert tools[0].input_schema["properties"]["index"]["enum"] == ["eins", "second"]
            asked = [(client, name) for client in (one, two) for name in ("eins", "second")]
            answers = await asyncio.gather(*(call(client, "list_documents", index=name) for client, name in asked))
            assert [len(answer["documents"]) for answer in answers] == [2, 3, 2, 3]
            Index.open(first, dtype="float32").upsert(tiny_passages(20))
            for client in (one, two):

                async def is_seen(client: Client = client) -> bool:
                    return len((await call(client, "list_documents", index="eins"))["documents"]) == 5

                while not await is_seen():
                    await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_standard_output_has_the_protocol_alone(index: Path):
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "d2llm", "mcp", str(index), "--dtype", "float32"]
    hello = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    messages = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "search", "arguments": {"query": "x"}}},
    ]
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": path},
            encoding="utf-8",
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(json.dumps(message) + "\n" for message in messages))
        process.stdin.write("no JSON\n" + '{"jsonrpc": "2.0", "id": 3, "method": "ping", "params": {"a": "\\ud83d"}}\n')
        process.stdin.write('{"jsonrpc": "2.0", "id": 5, "method": "ping", "params": "no object"}\n')
        process.stdin.write('{"jsonrpc": "2.0", "id": 4, "method": "ping"}\n')
        process.stdin.flush()
        answers: dict[Any, Any] = {}
        while not {1, 2, 3, 4, 5} <= answers.keys():
            line = json.loads(process.stdout.readline())
            assert line["jsonrpc"] == "2.0"
            answers[line.get("id")] = line
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.wait(PATIENCE) == 0
        errors.seek(0)
        log = errors.read()
    assert answers[1]["result"]["serverInfo"]["name"] == "d2llm"
    assert answers[2]["result"]["structuredContent"]["sources"]
    assert "hex escape" in answers[3]["error"]["message"]  # half of a surrogate pair
    assert (answers[3]["error"]["code"], answers[5]["error"]["code"]) == (-32700, -32600)
    assert "has no id to be answered by: " in log  # of "no JSON"
    assert "ready" in log
    assert "Traceback" not in log


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_it_ends_at_once_while_it_waits_for_input(index: Path):
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "d2llm", "mcp", str(index), "--dtype", "float32"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONPATH": path}, text=True) as process:
        assert process.stderr is not None
        while "ready" not in (line := process.stderr.readline()):
            assert line, "it ended before it was ready"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == -signal.SIGINT


def test_an_index_that_cannot_be_opened_is_the_answer_of_the_tools(tmp_path: Path):
    index = write_tiny_index(tmp_path, 8)
    (tmp_path / "student-0").rename(tmp_path / "moved")

    async def work(client: Client) -> None:
        assert [tool.name for tool in (await client.list_tools()).tools] == READING
        message = await refused(client, "search", query=QUERY)
        assert "nothing can be searched" in message
        assert "student-0" in message

    with TemporaryFile("w+") as errors:
        ask_program(work, index, errors=errors)


def test_a_folder_without_an_index_is_reported_at_once(tmp_path: Path):
    fail("mcp", tmp_path, containing=["is not a d2llm index folder"])
    fail("mcp", tmp_path / "none", containing=["none"])
    fail("mcp", tmp_path, "--json", "-", containing=["standard output is given twice"])


def test_its_help_has_no_address_and_no_keys():
    text = succeed("mcp", "--help").stdout
    assert "--writable" in text
    assert "--student" in text
    for option in ("--host", "--port", "--keys-file", "--report"):
        assert option not in text


def configurations() -> list[Any]:
    """The configurations of clients in the page."""
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "agents.md").read_text(encoding="utf-8")
    fences = [token for token in MarkdownIt().parse(text) if token.type == "fence" and token.info in ("json", "toml")]
    return [
        json.loads(fence.content) if fence.info == "json" else parse_toml(fence.content, where="agents.md")
        for fence in fences
    ]


def test_the_page_has_valid_configurations_of_clients():
    servers = [
        server
        for configuration in configurations()
        for name, group in configuration.items()
        if name in ("mcpServers", "servers", "mcp_servers", "mcp")
        for server in group.values()
    ]
    assert len(servers) == len(configurations()) == 11
    for server in servers:
        if "command" in server:
            command = server["command"]
            name, verb, *rest = command if isinstance(command, list) else (command, *server["args"])
            assert name == "d2llm"
            PROGRAM.commands[verb].make_context(verb, rest)
        else:
            assert server.get("url", server.get("httpUrl")) == "http://127.0.0.1:8000/mcp"
            assert "D2LLM_KEY" in str(server) or "d2llm-key" in str(server)


def test_without_the_package_the_command_to_install_it_is_shown(index: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    fail("mcp", index, containing=["the Model Context Protocol needs the package 'mcp'", "pip install 'd2llm[mcp]'"])


def test_the_package_is_imported_only_when_it_is_used():
    code = (
        "import sys, d2llm, d2llm.cli.main, d2llm.server.app\n"
        "assert not {'mcp', 'mcp_types'} & set(sys.modules), 'imported'"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert d2llm("--help").exit_code == 0


@pytest.mark.skipif(shutil.which("mcp-inspector") is None, reason="needs npm's @modelcontextprotocol/inspector")
def test_the_inspector_of_the_protocol_finds_no_fault(index: Path):
    def inspect(*options: str) -> Any:
        program = Path(sys.executable).parent / "d2llm"
        command = ["mcp-inspector", "--cli", str(program), "mcp", str(index), "--method", *options]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert [tool["name"] for tool in inspect("tools/list", "--strict")["tools"]] == READING
    (content,) = inspect("resources/read", "--uri", "d2llm:///docs/d0")["contents"]
    called = inspect("tools/call", "--tool-name", "read", "--tool-arg", "document_id=d0")
    assert called["structuredContent"] == json.loads(content["text"])


def test_tools_are_listed_without_the_libraries_of_models():
    code = "import sys, d2llm.cli.serve, d2llm.server.agent_streams; assert not {'torch', 'faiss'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
