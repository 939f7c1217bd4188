"""Parsers of recipes, answers of models and endpoints, files of models and indexes, and requests, as targets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from campaign.guided_documents import of_path, of_text
from campaign.guided_shards import LABELS
from campaign.guided_targets import Read, Target, json_of, lines_of, of_file, text_of

_SETTINGS = b'host = "127.0.0.1"\nport = 0\nallowed_hosts = ["a", "b"]\nrequests_per_minute = 5\nstudent = "x"\n'
_ANSWERS = (
    b'["what do cats eat", "how long do cats sleep"]',
    b'<think>hm</think>\n1. what do cats eat?\n2) **how long** do cats sleep\n- "a query",\n',
    b'```json\n["a b"]\n```\nSure, here are the queries:\nQuery 1: cats',
)
_GRADES = (b'{"1": 90, "2": "none", "3": 5}', b"[1] 90\n[2]: 5/100\nPassage 3 - 85\n", b'[{"passage": 1, "grade": 3}]')
_RANKINGS = (b"The order is: [2] > [3] > [1]", b'{"ranking": [2, 1, 3]}', b"2, 1, 3\n3\n1")
_COMPLETIONS = lines_of(
    {
        "choices": [{"message": {"content": "a", "refusal": None}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    },
    {"choices": [{"text": "a", "logprobs": {"top_logprobs": [{"yes": -0.1, "no": -3}]}}]},
    {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": -0.1}]}]}}]},
    {"data": [{"index": 0, "embedding": [1.0, 0.5]}, {"index": 1, "embedding": [0, 1]}], "usage": {"prompt_tokens": 2}},
    {"error": {"message": "too long", "code": 400}},
).splitlines()
_ARGUMENTS = lines_of(
    {"query": "cat", "top_k": 3, "filter": "year > 1"},
    {"passage_id": "p1", "neighbours": 2},
    {"document_id": "d1", "start": 9, "max_tokens": 100},
    {"documents": [{"id": "a", "text": "b", "title": "c", "metadata": {"year": 1}}], "lenient_metadata": True},
    {"cursor": "", "limit": 5, "index": "docs"},
).splitlines()
_FORM = (
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.md"\r\n\r\n# A\n\nText\r\n'
    b"--x\r\nContent-Disposition: form-data; name=\"file\"; filename*=UTF-8''b%20c.jsonl.gz\r\n\r\nabc\r\n--x--\r\n"
)
_MESSAGES = lines_of(
    {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "search", "arguments": {"query": "cat"}}},
    {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
).splitlines()


def _recipe(folder: Path) -> Read:
    del folder
    from d2llm.recipe.recipe import load_recipe_text

    return lambda data: load_recipe_text(text_of(data), where="recipe.toml")


def _recipes() -> list[bytes]:
    folder = Path(__file__).parents[2] / "src" / "d2llm"
    return [path.read_bytes() for path in sorted(folder.rglob("recipes/*.toml"))[:6]]


def _settings(path: Path) -> object:
    from d2llm.server.settings import load_settings

    return load_settings(file=path)


def _answer(*, is_passage: bool) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        del folder
        from d2llm.models.writers.answers import describe_problem, parse_answer

        def read(data: bytes) -> object:
            text = text_of(data[1:])
            prompt = "Write queries for the passage."
            found = parse_answer(
                text, prompt=prompt, num_queries=3, is_complete=data[:1] < b"\x80", is_passage=is_passage
            )
            assert len(found[0]) <= 3, "more queries than were asked for"
            return describe_problem(text, is_passage=is_passage)

        return read

    return make


def _of_lists(name: str) -> Callable[[Path], Read]:
    def make(folder: Path) -> Read:
        del folder
        from d2llm.models.teachers import list_answers

        def read(data: bytes) -> object:
            found = getattr(list_answers, name)(text_of(data), 3)
            assert {*found} <= {1, 2, 3}, "a passage that was not shown"
            assert len({*found}) == len(found), "a passage twice"
            if isinstance(found, dict):
                assert all(0 <= grade <= 100 for grade in cast("dict[int, float]", found).values()), "no grade"
            return found

        return read

    return make


def _endpoint(folder: Path) -> Read:
    """What an endpoint answers to a request for a completion, vectors or log-probabilities, as the first byte says."""
    del folder
    import httpx2

    from d2llm.methods.backbones import remote as vectors
    from d2llm.models.remote.completions import read_completion
    from d2llm.models.remote.endpoint import BusyError, Endpoint
    from d2llm.models.teachers import remote as teachers
    from d2llm.recipe import EndpointConfig

    def log_odds(answer: Any) -> object:
        found = answer["choices"][0]["logprobs"]
        form = teachers._chat_form if "content" in found else teachers._completion_form
        return form(found["content"] if "content" in found else found["top_logprobs"])

    readers = [read_completion, vectors._read_answer, log_odds]
    config = EndpointConfig(url="http://127.0.0.1:9/v1")
    names = {"path": "x", "section": "teacher", "text": "a prompt", "answer": "a completion", "shorten": "shorten it"}
    endpoints = [Endpoint("m", config, reader, **names) for reader in readers]

    class Client:
        status, content = 200, b""

        async def post(self, address: str, json: object) -> httpx2.Response:
            del json
            return httpx2.Response(self.status, content=self.content, request=httpx2.Request("POST", address))

    client: Any = Client()

    def read(data: bytes) -> object:
        first = data[0] if data else 0
        client.status, client.content = (400 if first > 200 else 200), data[1:]
        endpoint: Any = endpoints[first % len(endpoints)]
        try:
            return asyncio.run(endpoint._post(client, {}))
        except BusyError:
            return None

    return read


# Files of models and indexes


def _tensors(path: Path) -> object:
    from d2llm.models.sources import load_arrays, load_metadata

    return load_arrays(path, remedy="restore it"), load_metadata(path)


def _safetensors() -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"b":"c"}}'
    return len(header).to_bytes(8, "little") + header + bytes(8)


def _student_manifest(path: Path) -> object:
    from d2llm.models.student_files import read_student_manifest

    return read_student_manifest(path.parent)


def _manifest() -> bytes:
    value = {"kind": "student", "format_version": 4, "d2llm_version": "1", "fingerprint": "a", "base_fingerprint": "b"}
    config = {"backbone": {"model": "x"}, "pooling": {"kind": "mean"}}
    return json.dumps(value | {"config": config, "pooling": "mean", "sha256": {}, "tasks": ["symmetric"]}).encode()


def _fitted(path: Path) -> object:
    from d2llm.models.fitted_part import PassageQuality, TermWeights
    from d2llm.models.probabilities import ProbabilityCalibration
    from d2llm.models.score_features import ScoreFeatures

    content = path.read_bytes()
    for part in (PassageQuality, TermWeights, ScoreFeatures, ProbabilityCalibration):
        (path.parent / part.file_name).write_bytes(content)
    kinds = {b"quality": PassageQuality, b"term_weights": TermWeights, b"probab": ProbabilityCalibration}
    part = next((part for word, part in kinds.items() if word in content), ScoreFeatures)
    return part.read(path.parent, "a")


def _checked(name: str, read: Callable[[Path], object]) -> Callable[[Path], Read]:
    """What writes JSON with a right checksum, as an attacker could, and reads its folder."""

    def make(folder: Path) -> Read:
        from d2llm.store.checksums import write_checked

        def call(data: bytes) -> object:
            value: Any = json_of(data)
            try:
                value.pop("own_checksum", None)
                write_checked(folder / name, value)
            except (AttributeError, TypeError, UnicodeEncodeError):  # no object, or half a surrogate pair
                (folder / name).write_bytes(data)
            return read(folder)

        return call

    return make


def _index_manifest(folder: Path) -> object:
    from d2llm.store.index_manifest import read_index_manifest

    return read_index_manifest(folder)


def _sharded_manifest(folder: Path) -> object:
    from d2llm.store.shards import read_sharded_manifest

    return read_sharded_manifest(folder)


def _vectors(folder: Path) -> object:
    from d2llm.store.vector_file import VectorFile, path_of

    path_of(folder, 0).write_bytes(bytes(64))
    file = VectorFile.open(folder, 0, 8)
    return file.damaged(file.codes()), file.num_bytes


def _word_segment(folder: Path) -> Read:
    """The record of a segment's words; what is not read from it is read from the texts again."""
    from d2llm.store.word_files import open_words, write_segment
    from d2llm.store.word_segment import WordSegment

    segment = WordSegment.from_texts(["the cat sat", "a dog ran", "rain"])
    write_segment(folder, 0, 0, segment)
    record = next(folder.glob("*.json"))

    def read(_: Path) -> object:
        coverage = open_words(folder, 0, 3, lambda first, end: WordSegment.from_texts(["cat"] * (end - first)))
        return coverage.problems, len(coverage.words)

    inner = _checked(record.name, read)(folder)
    return lambda data: inner(data or record.read_bytes())


def _words_file(path: Path) -> object:
    from d2llm.store.background_words import BackgroundWords

    return BackgroundWords.read(path)


def _drafts(path: Path) -> object:
    from d2llm.fitting.write_queries import DraftStore

    return DraftStore(path.parent, "w")


def _plan(path: Path) -> object:
    from d2llm.data.plan import _parse

    return [_parse(path, at, line) for at, line in enumerate(path.read_bytes().splitlines(), start=1)]


# Requests


def _body(folder: Path) -> Read:
    del folder
    from d2llm.server import large_bodies

    def read(data: bytes) -> object:
        if large_bodies.problem_of_text(data) is not None:
            return None
        return large_bodies._parsed(data)

    return read


def _arguments(folder: Path) -> Read:
    del folder
    from d2llm.server.agent_arguments import TOOLS

    tools = [tool.arguments for _, tool in sorted(TOOLS.items())]

    def read(data: bytes) -> object:
        return tools[data[0] % len(tools) if data else 0].model_validate(json_of(data[1:]))

    return read


def _messages(folder: Path) -> Read:
    """Lines that a program sends to the server of its agent: each request has an answer, or is passed on."""
    del folder
    from mcp import types
    from mcp.shared.message import SessionMessage
    from pydantic import ValidationError

    from d2llm.server import agent_streams

    async def of_line(data: bytes) -> None:
        passed: list[object] = []

        async def received() -> Any:
            try:
                yield SessionMessage(types.jsonrpc_message_adapter.validate_json(data, by_name=False))
            except ValidationError as error:
                yield error

        async def keep(message: SessionMessage) -> None:
            passed.append(message)

        await agent_streams._pass_on(received(), keep, keep)

    return lambda data: asyncio.run(of_line(data))


def _form(folder: Path) -> Read:
    del folder
    from d2llm.server import uploads
    from d2llm.server.settings import ServeSettings

    limits = ServeSettings(index=Path("x"))

    def read(data: bytes) -> object:
        return list(uploads._files_of(data, "multipart/form-data; boundary=x", limits))

    return read


def _headers(folder: Path) -> Read:
    """The address, Host, Origin, key and id of a request, one on a line."""
    del folder
    from starlette.datastructures import Headers

    from d2llm.server import access, middleware

    names = [b"host", b"origin", b"authorization", b"x-request-id", b"content-length", b"sec-fetch-site", b"x-api-key"]

    def read(data: bytes) -> object:
        path, *values = data.split(b"\n")
        headers = [pair for pair in zip(names, values, strict=False) if pair[1]]
        scope = {"type": "http", "path": path.decode("latin-1"), "method": "POST", "headers": headers}
        _, rest = middleware.split_address(scope["path"])
        access.scope_needed("POST", rest)
        middleware.problem_of_host(scope, allowed=["localhost", "*.example.org"])
        middleware.problem_of_origin(scope, allowed=[])
        access._secret_of(Headers(scope=scope))
        middleware._id_of(Headers(scope=scope))
        return middleware._has_body(Headers(scope=scope))

    return read


def _recipe_part(path: Path) -> object:
    from d2llm.models.writers.prompts import load_writer_prompt

    return load_writer_prompt(str(path), "question")


_KEYS = {
    "version": 1,
    "keys": [{"name": "a", "sha256": "0" * 64, "scope": "read", "indexes": ["a"], "created": "2024-01-01"}],
}
_PROMPT = (
    b'[question]\ntemplate = "Write {num_queries} about {title} {passage} {examples}"\ntitle = "{title}"\n'
    b'example = "{passage} {query}"\n'
)
_OWNER = {"format_version": 1, "student": "a"}
_FITTED = lines_of(
    {
        "kind": "quality",
        **_OWNER,
        "weights": {"dot": [0.5], "base": 1},
        "num_passages": 1,
        "num_relevant": 1,
        "auc": 0.5,
    },
    {
        "kind": "term_weights",
        **_OWNER,
        "weights": {"dot": [0.5], "base": 1},
        "offset": 1,
        "usual": 1,
        "floor": 0,
        "num_words": 1,
        "explained": 0.5,
    },
    {"kind": "probabilities", **_OWNER, "num_hard": 1, "tasks": {"symmetric": {}}},
    {"kind": "score_features", **_OWNER, "tasks": {"symmetric": {}}},
).splitlines()
_DRAFT = {"passage_hash": "a", "kind": "question", "queries": ["b"], "num_prompt_tokens": 1, "num_written_tokens": 2}
_PLAN = {"query_id": "q", "positives": ["a"], "hard_negatives": ["b"], "easy_negatives": []}
_INDEX = {
    "kind": "index",
    "format_version": 1,
    "student": "a",
    "task": "symmetric",
    "dim": 8,
    "vector_format": "float32",
}
_SHARD = {"address": "b", "version": 1, "num_passages": 1, "files": "x"}
_SHARDED = {"kind": "sharded index", "format_version": 2, "index": "a", "shards": [_SHARD], "chunking": None}
_SEGMENT = {"rule": "x", "by_dictionary": False, "mean_length": 2.0, "arrays": {"lengths": [0, 3]}, "block_bytes": 1}
_REPORT = {
    "verb": "evaluate",
    "result": {"report_version": 2, "dataset": "a", "split": "dev", "systems": [{"name": "x", "measures": {}}]},
}

MODELS: dict[str, Target] = LABELS | {
    "recipe": Target(_recipe, _recipes()),
    "settings": Target(of_file("serve.toml", _settings), [_SETTINGS]),
    "prompts": Target(
        of_file("a.toml", _recipe_part),
        [_PROMPT],
    ),
    "keys": of_path("keys.json", "d2llm.server.keys", "read_keys", json.dumps(_KEYS).encode(), json=True),
    "answers": Target(_answer(is_passage=False), [b"\0" + answer for answer in _ANSWERS]),
    "answered passages": Target(_answer(is_passage=True), [b"\0Passage: the cat sleeps.\n\nIt eats."]),
    "grades": Target(_of_lists("read_grades"), _GRADES, json=True),
    "rankings": Target(_of_lists("read_ranking"), _RANKINGS, json=True),
    "endpoint": Target(_endpoint, [bytes([n]) + text for n in range(3) for text in _COMPLETIONS]),
    "retry-after": of_text("d2llm.models.remote.endpoint", "retry_after", b"1.5", b"Wed, 21 Oct 2015 07:28:00 GMT"),
    "tensors": Target(of_file("a.safetensors", _tensors), [_safetensors()]),
    "student": Target(of_file("manifest.json", _student_manifest), [_manifest()], json=True),
    "fitted values": Target(
        of_file("a.json", _fitted),
        _FITTED,
        json=True,
    ),
    "index": Target(_checked("manifest.json", _index_manifest), [json.dumps(_INDEX).encode()], json=True),
    "shards": Target(_checked("manifest.json", _sharded_manifest), [json.dumps(_SHARDED).encode()], json=True),
    "vectors": Target(
        _checked("vectors-0.json", _vectors), [b'{"extents": [[0, 8, "x"]], "code_size": 8, "since": 0}'], json=True
    ),
    "words": Target(_word_segment, [json.dumps(_SEGMENT).encode(), b""], json=True),
    "words of a language": Target(of_file("a.npz", _words_file), [b"PK\x05\x06" + bytes(18)]),
    "drafts": Target(of_file("drafts-w.jsonl", _drafts), [lines_of(_DRAFT)], json=True),
    "plan": Target(of_file("plan.jsonl", _plan), [lines_of(_PLAN)], json=True),
    "expansions": of_path(
        "a.jsonl",
        "d2llm.methods.losses.soft_expansion",
        "read_expansions",
        lines_of({"query": "a", "passages": ["b"]}),
        json=True,
    ),
    "leaderboard": of_path("a.json", "d2llm.evaluation.leaderboard", "_read", json.dumps(_REPORT).encode(), json=True),
    "body": Target(
        _body,
        [b'{"query": "cat", "top_k": 3, "x": [1, 2.5e3, null, "\\u00e9"]}'],
        json=True,
        expected=["RequestValidationError"],
    ),
    "agents' arguments": Target(
        _arguments, [bytes([n]) + text for n in range(6) for text in _ARGUMENTS], expected=["ValidationError"]
    ),
    "agents' messages": Target(_messages, _MESSAGES, json=True),
    "form": Target(_form, [_FORM]),
    "headers": Target(
        _headers, [b"/indexes/a/v1/search\nlocalhost:80\nhttp://localhost\nBearer x\nid\n5\nsame-origin"]
    ),
}
