"""Shards in object storage: copied once, compared with checksums, and clear errors if they cannot be read."""

from __future__ import annotations

import shutil

import pytest

from d2llm.core.errors import DataFormatError, InputError, MissingExtraError
from d2llm.retrieval.index import Index
from d2llm.retrieval.shard import shard
from d2llm.store import remote_shards
from d2llm.store.shards import Storage
from sharded_index import BoundedStudent, random_passages, results_of

fsspec = pytest.importorskip("fsspec", reason="needs fsspec: pip install 'd2llm[object-storage]'")
STUDENT = BoundedStudent()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Copies go to a folder of the test; the storage in memory is empty."""
    fsspec.filesystem("memory").store.clear()
    monkeypatch.setenv(remote_shards.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def one(tmp_path):
    index = Index.create(tmp_path / "one", STUDENT, window_vectors="int3", token_vectors="int4")
    index.upsert(random_passages(40))
    return index


def put_away(one, folder, url="memory://bucket/docs"):
    shard(one.folder, folder, 2, remote=url)
    return folder


def test_shards_are_fetched_once_and_searched(one, tmp_path, cache):
    folder = put_away(one, tmp_path / "away")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json"]
    assert not list(tmp_path.glob(".away*"))
    index = Index.open(folder, STUDENT)
    assert [results_of(r) for r in index.search(["apple pear", "fig"])] == [
        results_of(r) for r in one.search(["apple pear", "fig"])
    ]
    assert len(list(cache.iterdir())) == 2
    fsspec.filesystem("memory").store.clear()  # from now on, the copies are used
    assert len(Index.open(folder, STUDENT)) == 40
    assert index.verify().problems == []


def test_a_file_url_works_like_a_bucket(one, tmp_path):
    folder = put_away(one, tmp_path / "away", (tmp_path / "bucket").as_uri())
    assert (tmp_path / "bucket" / "shard-0001" / "files.json").is_file()
    assert len(Index.open(folder, STUDENT)) == 40


def test_a_missing_shard_or_file_is_an_error_with_the_url(one, tmp_path, cache):
    folder = put_away(one, tmp_path / "away")
    memory = fsspec.filesystem("memory")
    name = next(path for path in memory.store if path.endswith("vectors-0.bin") and "shard-0001" in path)
    content = memory.store.pop(name)
    with pytest.raises(InputError, match="memory://bucket/docs/shard-0001: there is no shard, or a file of it"):
        Index.open(folder)
    assert len(list(cache.glob("*-1-*"))) == 0  # no half copy
    memory.store[name] = content
    memory.rm("/bucket/docs/shard-0000", recursive=True)
    shutil.rmtree(cache)
    with pytest.raises(InputError, match="shard-0000: there is no shard"):
        Index.open(folder)


def test_damage_is_found_while_it_is_copied(one, tmp_path):
    folder = put_away(one, tmp_path / "away")
    memory = fsspec.filesystem("memory")
    name = next(path for path in memory.store if path.endswith(".bin") and "vectors-0" in path)
    damaged = bytearray(memory.cat_file(name))
    damaged[5] ^= 1
    memory.pipe_file(name, bytes(damaged))
    with pytest.raises(DataFormatError, match=r"memory://?/?bucket/docs/shard-000.*is not what was written"):
        Index.open(folder)


def test_a_replaced_shard_is_noticed(one, tmp_path):
    folder = put_away(one, tmp_path / "away")
    put_away(one, tmp_path / "again")  # other files at the same address
    with pytest.raises(DataFormatError, match="not the list of the files that were written there"):
        Index.open(folder)


def test_without_rights_or_a_bucket_the_error_names_the_url(one, tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(self, *arguments, **options):
        raise PermissionError("403 Forbidden")

    def missing(self, *arguments, **options):
        raise FileNotFoundError("no bucket")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", refuse)
        with pytest.raises(
            InputError, match="memory://bucket/docs/shard-0000: cannot be written, because access is de"
        ):
            put_away(one, tmp_path / "away")
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", missing)
        with pytest.raises(
            InputError, match=r"shard-0000: there is no such bucket or folder \(no bucket\); .* make it"
        ):
            put_away(one, tmp_path / "away")
    assert not (tmp_path / "away").exists()
    folder = put_away(one, tmp_path / "away")  # goes on with the shards that are there
    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(
        InputError, match=r"shard-0000: cannot be read, because access is denied.*check the credentials"
    ):
        Index.open(folder)


def test_any_other_error_of_the_storage_names_the_url(one, tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    folder = put_away(one, tmp_path / "away")

    def fails(self, *arguments, **options):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails)
    with pytest.raises(InputError, match=r"cannot be read \(RuntimeError: no route to host\); check the address"):
        Index.open(folder)


def test_a_missing_package_and_an_unknown_protocol(one, tmp_path, monkeypatch):
    folder = put_away(one, tmp_path / "away")
    path = folder / "manifest.json"
    store = Storage.open(folder)
    from dataclasses import replace

    from d2llm.store.shards import write_sharded_manifest

    records = [replace(record, address="no-such://bucket", files="x") for record in store.records]
    write_sharded_manifest(folder, store.manifest, records)
    with pytest.raises(InputError, match=r"no-such://bucket: cannot be read \(ValueError: Protocol not known"):
        Index.open(folder)
    try:
        import s3fs  # noqa: F401
    except ImportError:
        write_sharded_manifest(folder, store.manifest, [replace(each, address="s3://b/c") for each in records])
        with pytest.raises(MissingExtraError, match="s3://b/c: fsspec needs another package for s3://"):
            Index.open(folder)
    assert path.is_file()


def test_remote_shards_are_only_read(one, tmp_path):
    index = Index.open(put_away(one, tmp_path / "away"), STUDENT)
    with pytest.raises(InputError, match=r"shard 0 is in object storage .* which is only read"):
        index.upsert(random_passages(2))
    with pytest.raises(InputError, match="only read"):
        index.delete(["p1"])


def test_the_cache_can_be_deleted(one, tmp_path, cache):
    folder = put_away(one, tmp_path / "away")
    assert len(Index.open(folder, STUDENT)) == 40
    shutil.rmtree(cache)
    assert len(Index.open(folder, STUDENT)) == 40
