"""A fake Hugging Face Hub with the endpoints that models need, behind huggingface_hub's own HTTP client.

Only the transport is replaced: requests, retries, resumed downloads and caching are the library's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import httpx2

OWNER_TOKEN = "hf_owner"


@dataclass
class Repository:
    """Commits by hash, each a mapping of path -> content; branches and tags point to commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        number = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[number] = files
        self.refs[branch] = number
        return number


@dataclass
class FakeHub:
    """Answers requests; ``log`` records them as "METHOD path", ``break_after`` truncates the next download by path.

    Of a ``damaged`` path, the last byte is sent as another one.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    break_after: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    ranges: list[str] = field(default_factory=list)
    reachable: bool = True
    _uploaded: dict[str, bytes] = field(default_factory=dict)

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self.answer), follow_redirects=True)

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = unquote(request.url.path)
        self.log.append(f"{request.method} {path}")
        if not self.reachable:
            raise httpx2.ConnectError("no route to host", request=request)
        parts = path.strip("/").split("/")
        if parts[0] == "uploads":  # signed URLs, as of a storage bucket
            self._uploaded[parts[1]] = request.read()
            return httpx2.Response(200)
        if request.method == "POST" and request.headers.get("authorization") != f"Bearer {OWNER_TOKEN}":
            return httpx2.Response(401, json={"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self._create(json.loads(request.content))
        if path == "/api/validate-yaml":
            return httpx2.Response(200, json={"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(request.content))
        name = "/".join(parts[2:4]) if parts[:2] == ["api", "models"] else "/".join(parts[:2])
        repository = self.repositories.get(name)
        if repository is None or (repository.private and "authorization" not in request.headers):
            return httpx2.Response(
                404, json={"error": "Repository not found"}, headers={"X-Error-Code": "RepoNotFound"}
            )
        if parts[:2] == ["api", "models"]:
            return self._api(name, repository, request, parts[4:])
        return self._resolve(repository, request, parts[3], "/".join(parts[4:]))

    def _create(self, asked: dict[str, Any]) -> httpx2.Response:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return httpx2.Response(409, json={"url": f"https://huggingface.co/{name}"})
        repository = self.repositories[name] = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs"})
        return httpx2.Response(200, json={"url": f"https://huggingface.co/{name}", "name": name})

    def _batch(self, asked: dict[str, Any]) -> httpx2.Response:
        url = "https://huggingface.co/uploads"
        objects = [{**item, "actions": {"upload": {"href": f"{url}/{item['oid']}"}}} for item in asked["objects"]]
        return httpx2.Response(200, json={"transfer": "basic", "objects": objects})

    def _api(self, name: str, repository: Repository, request: httpx2.Request, rest: list[str]) -> httpx2.Response:
        kind, revision = (rest[0], rest[1]) if rest else ("revision", "main")
        if kind == "branch":
            repository.refs.setdefault(revision, repository.refs["main"])
            return httpx2.Response(201, json={})
        files = repository.files(revision)
        if files is None:
            return httpx2.Response(404, json={"error": "no"}, headers={"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            sha = repository.refs.get(revision, revision)
            return httpx2.Response(200, json={"id": name, "modelId": name, "sha": sha, "tags": [], "siblings": []})
        if kind == "tree":
            return httpx2.Response(200, json=[_entry(path, content) for path, content in files.items()])
        if kind == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False, "oid": None}
                for file in json.loads(request.content)["files"]
            ]
            return httpx2.Response(200, json={"files": modes})
        assert kind == "commit", rest
        changed = dict(files)
        for line in map(json.loads, request.content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self._uploaded[value["oid"]]
            elif line["key"] == "deletedFile":
                del changed[value["path"]]
        oid = repository.commit(revision, changed)
        page = f"https://huggingface.co/{name}/commit/{oid}"
        return httpx2.Response(200, json={"success": True, "commitOid": oid, "commitUrl": page, "hookOutput": ""})

    def _resolve(self, repository: Repository, request: httpx2.Request, revision: str, path: str) -> httpx2.Response:
        content = (repository.files(revision) or {}).get(path)
        if content is None:
            return httpx2.Response(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": repository.refs.get(revision, revision),
            "Accept-Ranges": "bytes",
        }
        if request.method == "HEAD":
            return httpx2.Response(200, headers=headers | {"Content-Length": str(len(content))})
        start = 0
        if range_header := request.headers.get("range"):
            self.ranges.append(f"{path} {range_header}")
            start = int(range_header.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        stop = self.break_after.pop(path, None)
        headers["Content-Length"] = str(len(content) - start)
        if path in self.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        body = _Body(content[start:], stop, request)
        return httpx2.Response(206 if range_header else 200, headers=headers, stream=body)


class _Body(httpx2.SyncByteStream):
    """The bytes of a file; with ``stop`` the connection breaks after that many bytes."""

    def __init__(self, content: bytes, stop: int | None, request: httpx2.Request) -> None:
        self._content, self._stop, self._request = content, stop, request

    def __iter__(self) -> Iterator[bytes]:
        yield self._content[: self._stop]
        if self._stop is not None:
            raise httpx2.RemoteProtocolError("peer closed connection", request=self._request)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(content).hexdigest()
    if _mode(path) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
