from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from d2llm.core.errors import DataFormatError, InputError
from d2llm.server import keys
from d2llm.server.keys import SCOPES, ApiKey, KeyRing, add_key, read_keys, remove_key
from e2e.command_line import fail, succeed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_random_and_only_its_hash_is_kept(file: Path):
    first, second = add_key(file, "first"), add_key(file, "second", "admin", 7)
    assert first != second
    assert len(first) >= len("d2llm_") + 43  # 256 bits in base64
    content = file.read_text()
    assert first not in content
    assert second not in content
    stored = read_keys(file)
    assert [(key.name, key.scope, key.requests_per_minute) for key in stored] == [
        ("first", "read", None),
        ("second", "admin", 7),
    ]
    assert stored[0].sha256 == hashlib.sha256(first.encode()).hexdigest()


def test_only_the_owner_may_read_the_file_whatever_the_umask(file: Path):
    before = os.umask(0)
    try:
        add_key(file, "first")
        file.chmod(0o644)
        add_key(file, "second")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_added_at_once_are_all_kept(file: Path):
    threads = [threading.Thread(target=add_key, args=(file, f"key{number}")) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.name for key in read_keys(file)) == [f"key{number}" for number in range(8)]


def test_key_names_are_unique_single_words(file: Path):
    add_key(file, "first")
    with pytest.raises(InputError, match="a key 'first' exists"):
        add_key(file, "first")
    for name in ("", "two words", "a\nb", "x" * 65, "-x"):
        with pytest.raises(InputError, match="is not a valid key name"):
            add_key(file, name)


def test_removing_an_unknown_key_is_an_error(file: Path):
    add_key(file, "first")
    with pytest.raises(InputError, match="there is no key 'second'; it has: first"):
        remove_key(file, "second")
    with pytest.raises(InputError, match="cannot be read"):
        remove_key(file.with_name("other.json"), "first")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 2}', '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "sha256": "00"}]}']
)
def test_an_invalid_key_file_is_refused(file: Path, content: str):
    file.write_text(content)
    with pytest.raises(DataFormatError, match=r"is not a file of API keys \(\w"):
        KeyRing(file)


def test_a_larger_scope_includes_the_smaller():
    allowed = {
        scope: [needed for needed in SCOPES if ApiKey(name="a", sha256="0" * 64, scope=scope).allows(needed)]
        for scope in SCOPES
    }
    assert allowed == {"read": ["read"], "write": ["read", "write"], "admin": ["read", "write", "admin"]}


def test_a_key_may_be_for_some_indexes(file: Path):
    add_key(file, "all")
    add_key(file, "some", indexes=["docs", "faq", "docs"])
    everything, some = read_keys(file)
    assert some.indexes == ("docs", "faq")
    assert [everything.allows_index(name) for name in ("docs", "other")] == [True, True]
    assert [some.allows_index(name) for name in ("docs", "faq", "other")] == [True, True, False]
    file.write_text(file.read_text().replace('"docs",\n        "faq"', ""))  # an empty list is not all
    with pytest.raises(DataFormatError, match="indexes"):
        read_keys(file)


# The keys of a running server


def test_a_key_matches_only_its_exact_secret(file: Path):
    secret = add_key(file, "first")
    ring = KeyRing(file)
    key = ring.find(secret)
    assert key is not None
    assert key.name == "first"
    for other in ("", secret[:-1], secret + "x", secret.upper(), key.sha256, "\udc80"):
        assert ring.find(other) is None


def test_all_keys_are_compared_even_after_a_match(file: Path, monkeypatch: pytest.MonkeyPatch):
    secrets = [add_key(file, name) for name in ("first", "second", "third")]
    compared: list[str] = []
    really_compare = hmac.compare_digest

    def compare(stored: str, presented: str) -> bool:
        compared.append(stored)
        return really_compare(stored, presented)

    ring = KeyRing(file)
    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    for secret in (*secrets, "wrong"):
        compared.clear()
        ring.find(secret)
        assert compared == [key.sha256 for key in read_keys(file)]


def test_a_running_server_sees_keys_come_and_go(file: Path):
    first = add_key(file, "first")
    ring = KeyRing(file)
    second = add_key(file, "second")
    assert ring.find(second) is not None
    remove_key(file, "first")
    assert ring.find(first) is None
    assert ring.find(second) is not None


def test_a_half_edited_file_leaves_the_keys_as_they_were(file: Path, caplog: pytest.LogCaptureFixture):
    secret = add_key(file, "first")
    ring = KeyRing(file)
    file.write_text('{"keys": [')
    assert ring.find(secret) is not None
    assert ring.find(secret) is not None
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # once, not at each request
    assert "keeping the previous API keys" in caplog.text


def test_an_unreadable_file_is_reread_when_permissions_change(file, monkeypatch, caplog):
    add_key(file, "first")
    ring = KeyRing(file)
    secret = add_key(file, "second")
    file.chmod(0o200)

    def refuse(path: Path) -> tuple[ApiKey, ...]:
        raise InputError(f"{path}: cannot be read")  # chmod alone is not enough: root may read the file anyway

    with monkeypatch.context() as patch:
        patch.setattr(keys, "read_keys", refuse)
        assert ring.find(secret) is None
    assert "keeping the previous API keys" in caplog.text
    file.chmod(0o600)
    assert ring.find(secret) is not None


def test_without_the_file_no_key_is_accepted(file: Path, caplog: pytest.LogCaptureFixture):
    secret = add_key(file, "first")
    ring = KeyRing(file)
    content = file.read_bytes()
    file.unlink()
    assert ring.find(secret) is None
    assert "no key is accepted" in caplog.text
    file.write_bytes(content)
    assert ring.find(secret) is not None


# The command line


def test_the_command_shows_a_key_once(file: Path):
    result = succeed("keys", file, "add", "page", "--scope", "write", "--requests-per-minute", 30)
    secret = result.stdout.strip()
    key = KeyRing(file).find(secret)
    assert key is not None
    assert key.indexes is None
    assert "'page' may write" in result.stderr
    assert secret not in succeed("keys", file, "list").stdout


def test_the_command_lists_and_removes_keys(file: Path, tmp_path: Path):
    succeed("keys", file, "add", "page")
    added = succeed("keys", file, "add", "batch", "--index", "docs", "--index", "faq")
    assert "'batch' may read in docs, faq" in added.stderr
    listing = succeed("keys", file, "list").stdout
    assert "page" in listing
    assert "docs, faq" in listing
    succeed("keys", file, "remove", "page")
    path = tmp_path / "report.json"
    assert "page" not in succeed("keys", file, "list", "--json", path).stdout
    report = json.loads(path.read_text())["result"]
    assert [(key["name"], key["indexes"]) for key in report] == [("batch", ["docs", "faq"])]
    assert "sha256" not in report[0]
    fail("keys", file, "remove", "page", containing=["there is no key 'page'"])
