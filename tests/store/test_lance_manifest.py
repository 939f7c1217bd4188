"""A LanceDB manifest names exactly the files that its version consists of."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2llm.store.lance_manifest import files_named, manifest_name, manifests, version_of
from d2llm.store.schema import MetadataSchema
from examples import examples
from tiny_store import few_passages, new_store, put

VERSION = "_versions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table with indices, both kinds of deletion files, several data files and a column added later."""
    store = new_store(tmp_path_factory.mktemp("table") / "index")
    put(store, few_passages(8_000).values())
    store.update_indices()
    store.delete(["p1", "p2"])
    put(store, few_passages(5, start=7_998, word="changed").values())
    store.add_fields(MetadataSchema({"later": "number"}))
    store.delete([f"p{n}" for n in range(100, 6_000)])  # this many are stored in the other kind of file
    return store.folder / "passages.lance"


def _files_on_disk(table: Path) -> set[str]:
    paths = (path.relative_to(table).as_posix() for path in table.rglob("*") if path.is_file())
    return {path for path in paths if not path.startswith(("_versions/", "_transactions/"))}


def test_a_manifest_names_all_needed_files_and_no_others(folder, tmp_path):
    """After compaction only files of the latest version are left. A LanceDB update may add kinds of files."""
    store = new_store(tmp_path / "index")
    put(store, few_passages(40).values())
    store.update_indices()
    store.delete(["p1"])
    put(store, few_passages(3, start=39).values())
    for _ in range(4):  # old files are removed once nothing new is written
        with store.writing():
            store.table().optimize(timedelta(0))
    table = store.folder / "passages.lance"
    ((version, path),) = manifests(table).items()
    listing = files_named((table / path).read_bytes())
    assert listing.version == version == store.table().version
    assert set(listing.needed) == _files_on_disk(table)
    assert (table / listing.transaction).is_file()
    assert listing.indices.keys() == {"id_idx", "d2_row_idx", "document_id_idx"}


def test_manifests_of_all_versions(folder):
    manifest_paths = manifests(folder)
    assert list(manifest_paths) == sorted(manifest_paths, reverse=True)
    for version, path in manifest_paths.items():
        listing = files_named((folder / path).read_bytes())
        assert listing.version == version
        assert path == manifest_name(version)
        assert set(listing.needed) <= _files_on_disk(folder)
    rows = [path for manifest in manifest_paths.values() for path in files_named((folder / manifest).read_bytes()).rows]
    assert {Path(path).suffix for path in rows} == {".lance", ".bin", ".arrow"}
    assert len({path for path in rows if path.startswith("data/")}) >= 2
    first = files_named((folder / manifest_paths[1]).read_bytes())
    assert (first.rows, first.indices) == ([], {})


def test_manifest_file_names():
    assert version_of("18446744073709551608.manifest") == 7
    assert manifest_name(7) == f"{VERSION}/18446744073709551608.manifest"
    for other in (
        "latest_version_hint.json",
        "d7.manifest",
        "7.manifest",
        ".tmp_7.manifest",
        "7.manifest.tmp",
        "manifest",
    ):
        assert version_of(other) is None


def test_a_folder_without_a_table_has_no_manifests(tmp_path):
    assert manifests(tmp_path) == {}


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbage_is_read_or_raises_value_error(folder, data):
    """Whatever the bytes, the result is a manifest or a ValueError."""
    content = bytearray((folder / next(iter(manifests(folder).values()))).read_bytes())
    damage = data.draw(st.sampled_from(["flip", "cut", "any"]))
    if damage == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content = bytearray(data.draw(st.binary(max_size=200))) + b"LANC"
    try:
        assert files_named(bytes(content)).version >= 0
    except ValueError as error:
        assert str(error)  # noqa: PT017
