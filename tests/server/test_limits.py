"""Rate limits shared by several servers through Redis, which may be running, hanging or down."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.core.errors import InputError
from d2llm.server import access
from d2llm.server.access import RateLimiter
from d2llm.server.running import listen
from tiny_app import tiny_client
from waiting import until


def test_an_invalid_address_is_refused_without_repeating_it():
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    with pytest.raises(InputError, match="redis://localhost:6379") as error:
        RateLimiter("http://user:secret@host")
    assert "secret" not in str(error.value)


def test_the_password_in_an_address_is_not_shown():
    from d2llm.server.settings import load_settings

    loaded = load_settings(assignments={"rate_limit_storage": "redis://:secret@host:1"})
    assert "secret" not in str(loaded) + str(loaded.lines()) + str(loaded.settings.model_dump_json())


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A socket that accepts connections but never responds."""
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        yield bound


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "away"])
def test_without_redis_a_server_counts_locally(listening, hangs: bool, monkeypatch, caplog):
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    monkeypatch.setattr(access, "_PATIENCE", 0.3)
    address = f"redis://127.0.0.1:{listening.getsockname()[1]}"
    if not hangs:
        listening.close()
    client = tiny_client(requests_per_minute=3, rate_limit_storage=address)
    monkeypatch.setattr(access, "_PAUSE", 1_000.0)
    with caplog.at_level(logging.ERROR):
        statuses = [client.post("/v1/search", json={"texts": ["q"]}).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert caplog.text.count("counting locally") == 1  # tried once, not five times


class Redis:
    """A real Redis server on its own port."""

    def __init__(self, folder: Path) -> None:
        with listen("127.0.0.1", 0) as bound:
            self.port = bound.getsockname()[1]
        self._folder = folder
        self.address = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL)
        until(self._is_there, "a Redis that listens")

    def _is_there(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    pytest.importorskip("redis", reason="needs the extra 'redis'")
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian: apt install redis-server)")
    server = Redis(tmp_path)
    yield server
    server.stop()


def test_two_servers_share_their_counts(redis: Redis):
    async def main() -> list[bool]:
        limiters = [RateLimiter(redis.address), RateLimiter(redis.address)]
        allowances = [await limiters[n % 2].take("key one", 5) for n in range(7)]
        other = await limiters[0].take("key two", 5)
        assert (other.remaining, other.limit) == (4, 5)
        assert allowances[4].remaining == 0
        assert 50 < allowances[6].reset <= 60
        return [allowance.allowed for allowance in allowances]

    assert asyncio.run(main()) == [True] * 5 + [False] * 2


def test_a_storage_that_comes_back_is_used_again(redis: Redis, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(access, "_PAUSE", 0.2)

    async def main() -> None:
        limiter, other = RateLimiter(redis.address), RateLimiter(redis.address)
        assert (await limiter.take("key", 5)).remaining == 4
        redis.stop()
        assert (await limiter.take("key", 5)).remaining == 4  # counted locally
        redis.start()
        await asyncio.sleep(0.3)  # more than the pause
        allowances = [(await other.take("key", 5)).remaining for _ in range(3)]
        assert allowances == [4, 3, 2]
        assert (await limiter.take("key", 5)).remaining == 1  # counted locally it would be 3

    asyncio.run(main())
