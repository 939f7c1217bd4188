"""The stores of an index: a single one, or one for each shard.

A sharded index is a folder with a manifest that lists ordinary indexes, its shards, in folders or in object storage:

INDEX/
  manifest.json   kind "sharded index": student, formats, chunking, and the shards (``ShardRecord``), with a checksum
  shard-0000/     an ordinary index (``index_store``), which can be opened on its own
  shard-0001/     ...

A passage is in the shard that a hash of its document's id names, or of its own id if it has no document, so that the
passages of a document are together, and a change goes to one shard only. Each shard's own manifest says which shard of
which sharded index it is.

A shard in object storage is read only. It is copied once into a cache folder, and compared with its checksums there
(``remote_shards``).
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, DataFormatError, IndexMismatchError, InputError
from d2llm.core.files import MANIFEST_NAME, check_replaceable, new_folder
from d2llm.core.manifest import package_versions, read_manifest
from d2llm.core.shipped import name_student
from d2llm.core.types import MissingShard, PartKind, Passage
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_manifest import CHUNKING, INDEX_FIELDS, change_manifest, without_notes
from d2llm.store.index_manifest import SHARDED_KIND as KIND
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore, check_maker
from d2llm.store.passage_table import PassageTable, Record
from d2llm.store.remote_shards import fetch_shard, is_url
from d2llm.store.schema import MetadataSchema
from d2llm.store.storage import storage_errors
from d2llm.store.vector_formats import VectorFormat

FORMAT_VERSION = 2
MAX_SHARDS = 1 << 16
_COMPARED = tuple(name for name in INDEX_FIELDS if name not in ("student_config", "student_source"))


def shard_of(passage_id: str, document_id: str, num_shards: int) -> int:
    """The number of the shard that a passage is in: a hash of its document's id, or of its own if it has none."""
    return xxhash.xxh3_64_intdigest((document_id or passage_id).encode()) % num_shards


def hashes_of_ids(records: Sequence[Record]) -> NDArray[np.uint64]:
    """Hashes of the ids [n] of some passages, to compare the passages of several shards."""
    hashes = (xxhash.xxh3_64_intdigest(record["id"].encode()) for record in records)
    return np.fromiter(hashes, np.uint64, len(records))


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What the manifest of a sharded index says about a shard.

    Attributes:
        address: its folder, relative to that of the sharded index or absolute, or its URL in object storage.
        version: the version of its table.
        num_passages: number of passages of that version.
        files: for a shard in object storage, the checksum of its list of files (``remote_shards``); else empty.
    """

    address: str
    version: int
    num_passages: int
    files: str = ""


class Storage:
    """The stores of an index: a single one, or one for each shard. A change is one commit in each store it concerns.

    Readers may see a change in one shard before they see it in another. After an interruption, repeat the change.
    ``records`` are what the manifest says about the shards; None if the index is not sharded.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        stores: Mapping[int, IndexStore],
        records: Sequence[ShardRecord] | None = None,
        missing: Sequence[MissingShard] = (),
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.records = None if records is None else list(records)
        self.missing = tuple(missing)
        self._stores = dict(stores)

    @classmethod
    def single(cls, store: IndexStore) -> Storage:
        """That of an index that is not sharded."""
        return cls(store.folder, store.manifest, {0: store})

    @classmethod
    def create(
        cls, folder: Path, spec: StoredSpec, *, num_shards: int | None = None, metadata: MetadataSchema | None = None
    ) -> Storage:
        """A new index without passages in a folder that must not exist, or be empty; it appears when it is complete.

        Args:
            folder: where it goes.
            num_shards: number of shards; None: it is not sharded.
            spec: what it, or each shard, is.
            metadata: fields with their types.

        Raises:
            InputError: the folder is not empty, the number of shards is not from 1 to 65,536, or a format is unknown.
            StorageError: it cannot be written.
        """
        if num_shards is None:
            return cls.single(IndexStore.create(folder, spec, metadata=metadata))
        if not 1 <= num_shards <= MAX_SHARDS:
            raise InputError(f"an index cannot have {num_shards:,} shards; give 1 to {MAX_SHARDS:,}")
        check_replaceable(folder, KIND)
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: already exists; open it (or give exist_ok=True), or give another folder")
        name = secrets.token_hex(8)
        with storage_errors(folder), new_folder(folder, kind=KIND) as draft:
            stores = {
                shard_number: IndexStore.create(
                    draft / shard_name(shard_number),
                    spec,
                    metadata=metadata,
                    shard={"number": shard_number, "of": num_shards, "index": name},
                )
                for shard_number in range(num_shards)
            }
            shared = {key: stores[0].manifest[key] for key in INDEX_FIELDS}
            manifest = {"kind": KIND, "format_version": FORMAT_VERSION, "packages": package_versions(), "index": name}
            records = [
                ShardRecord(shard_name(shard_number), store.version, 0) for shard_number, store in stores.items()
            ]
            write_sharded_manifest(draft, manifest | shared, records)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, *, allow_missing: bool = False) -> Storage:
        """The index in a folder, sharded or not.

        ``allow_missing``: shards that cannot be opened are left out and listed in ``missing``.

        Raises:
            DataFormatError: there is no index, its manifest is damaged, or a shard is missing or damaged.
            IndexMismatchError: a shard belongs to another index, or was made by another student.
            InputError: a shard in object storage cannot be read.
            MissingExtraError: a shard is in object storage, but fsspec or what it needs for that is not installed.
        """
        if not is_sharded(folder):
            return cls.single(IndexStore.open(folder))
        manifest, records = read_sharded_manifest(folder)
        stores: dict[int, IndexStore] = {}
        missing: list[MissingShard] = []
        for shard_number, record in enumerate(records):
            try:
                stores[shard_number] = open_shard(folder, manifest, shard_number, record, len(records))
            except D2LLMError as error:
                if not allow_missing:
                    raise
                missing.append(MissingShard(shard_number, record.address, str(error)))
        if not stores:
            raise InputError(
                f"{folder}: none of its {len(records)} shards can be opened; the first: {missing[0].problem}"
            )
        return cls(folder, manifest, stores, records, missing)

    @classmethod
    def of_manifest(cls, folder: Path) -> Storage:
        """A sharded index whose shards are opened elsewhere: without ``stores``.

        Raises:
            DataFormatError: its manifest is missing or damaged.
        """
        manifest, records = read_sharded_manifest(folder)
        return cls(folder, manifest, {}, records)

    @property
    def stores(self) -> list[IndexStore]:
        """The stores that could be opened, in the order of the shards."""
        return list(self._stores.values())

    @property
    def num_shards(self) -> int | None:
        """Number of shards, missing ones included; None if the index is not sharded."""
        return None if self.records is None else len(self.records)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the shards that are not missing."""
        missing = {shard.number for shard in self.missing}
        return [shard_number for shard_number in range(self.num_shards or 1) if shard_number not in missing]

    @property
    def part_formats(self) -> Mapping[PartKind, VectorFormat]:
        """The formats of the vectors of parts, by kind."""
        return self.stores[0].part_formats

    @property
    def version(self) -> int:
        """The latest version; of a sharded index, the sum of the shards' versions, which grows with each change."""
        listed = self.records or []
        return sum(
            self._stores[shard_number].version if shard_number in self._stores else listed[shard_number].version
            for shard_number in self.numbers
        )

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields of the latest version, which all shards have."""
        return self.stores[0].metadata

    def snapshots(self) -> list[str]:
        """The names of the snapshots; a sharded index has none, only its shards do."""
        return self.stores[0].snapshots() if self.records is None else []

    def shard_of(self, passage: Passage) -> int:
        """The number of the shard that a passage belongs in."""
        return shard_of(passage.id, passage.document_id, self.num_shards or 1)

    def __len__(self) -> int:
        """Number of passages of the latest version."""
        return sum(map(len, self.tables()))

    def tables(self) -> list[PassageTable]:
        """The latest versions of the stores' tables."""
        return [store.table() for store in self.stores]

    def positions_of(self, documents: Sequence[str]) -> list[tuple[str, str, int]]:
        """As of ``PassageTable``."""
        return [part for table in self.tables() for part in table.positions_of(documents)]

    def check_student(self, fingerprint: str) -> None:
        """Raise an ``IndexMismatchError`` unless the student with this fingerprint made the vectors."""
        check_maker(self.folder, self.manifest, fingerprint)

    @contextmanager
    def writing(self) -> Generator[None]:
        """Hold the write locks of all stores, and list the shards' versions in the manifest at the end; may be nested.

        Raises:
            InputError: a shard is in object storage, or missing; or this is a snapshot.
            IndexLockedError: another process is writing.
        """
        for missing in self.missing:
            raise InputError(
                f"{self.folder}: cannot be changed while shard {missing.number} is missing: {missing.problem}"
            )
        for shard_number, record in enumerate(self.records or ()):
            if is_url(record.address):
                raise InputError(
                    f"{self.folder}: shard {shard_number} is in object storage ({record.address}), which is only read; "
                    "change the index that it was made from, and shard that again"
                )
        with ExitStack() as locks:
            for store in self.stores:
                locks.enter_context(store.writing())
            try:
                yield
            finally:
                self.save()

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the locks of all stores, without a change."""
        with ExitStack() as locks:
            for store in self.stores:
                locks.enter_context(store.locked())
            yield

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the passages with these ids, each from the store that has it; returns their number."""
        with self.writing():
            return sum(store.delete(ids) for store in self.stores)

    def add_fields(self, fields: MetadataSchema) -> None:
        """Add metadata fields that do not exist yet to all stores."""
        with self.writing():
            for store in self.stores:
                store.add_fields(fields)

    def save(self) -> None:
        """Write the manifest of a sharded index with the current versions of the shards, if it has changed."""
        if self.records is None:
            return
        records = list(self.records)
        for shard_number, store in self._stores.items():
            table = store.table()
            records[shard_number] = replace(records[shard_number], version=table.version, num_passages=len(table))
        if records != self.records:
            self.records = records
            change_manifest(self.folder, **_entry(records))


def shard_name(shard_number: int) -> str:
    """The name of a shard's folder."""
    return f"shard-{shard_number:04}"


def is_sharded(folder: Path) -> bool:
    """Whether a folder holds a sharded index."""
    try:
        return read_checked(folder / MANIFEST_NAME, compare=False).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def write_sharded_manifest(folder: Path, manifest: Mapping[str, Any], records: Iterable[ShardRecord]) -> None:
    """Write the manifest of a new sharded index, atomically, with a checksum."""
    write_checked(folder / MANIFEST_NAME, {**manifest, CHUNKING: None, **_entry(records)})


def _entry(records: Iterable[ShardRecord]) -> dict[str, Any]:
    return {"shards": [asdict(record) for record in records]}


def read_sharded_manifest(folder: Path) -> tuple[dict[str, Any], list[ShardRecord]]:
    """The manifest of a sharded index, without its shards and what else may change, and the shards.

    Raises:
        DataFormatError: it is missing, damaged, or has another format.
    """
    read_manifest(folder, KIND, FORMAT_VERSION)
    path = folder / MANIFEST_NAME
    try:
        manifest = cast("dict[str, Any]", read_checked(path))
        records = [ShardRecord(**record) for record in manifest.pop("shards")]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataFormatError(
            path, f"cannot be used ({error}); restore it from a copy, or shard the index again"
        ) from error
    if not records or not {"index", CHUNKING, *INDEX_FIELDS} <= manifest.keys():
        raise DataFormatError(
            path, "does not describe a sharded index; restore it from a copy, or shard the index again"
        )
    return without_notes(manifest), records


def open_shard(
    folder: Path, manifest: Mapping[str, Any], shard_number: int, record: ShardRecord, num_shards: int
) -> IndexStore:
    """The store of one shard of the sharded index in a folder, with this manifest.

    Raises:
        DataFormatError, IndexMismatchError, InputError, MissingExtraError: as for ``Storage.open``.
    """
    where = f"{folder}: shard {shard_number} of {num_shards}"
    if is_url(record.address):
        path = fetch_shard(record.address, record.files, name=f"{manifest['index']}-{shard_number}")
    else:
        path = folder / record.address
        if not path.is_dir():
            raise DataFormatError(
                path, f"is missing, but is {where}; put it back from a copy, or shard the index again"
            )
    store = IndexStore.open(path)
    if store.manifest["student"] != manifest["student"]:
        maker, other = (name_student(spec["student"], spec["student_source"]) for spec in (manifest, store.manifest))
        raise IndexMismatchError(
            f"{where} in {record.address} was made by student {other}, but the index by {maker}; put the right shard "
            "there, or shard the index again"
        )
    recorded = store.manifest.get("shard")
    differing = [name for name in _COMPARED if store.manifest[name] != manifest[name]]
    if recorded != {"number": shard_number, "of": num_shards, "index": manifest["index"]} or differing:
        what = "it is not the shard that was written there"
        if differing:
            what = f"it has another {', '.join(differing)}"
        raise IndexMismatchError(f"{where} in {record.address}: {what}; put the right shard there, or shard again")
    if store.version < record.version:
        raise IndexMismatchError(
            f"{where} in {record.address} is at version {store.version}, an older one than {record.version}, which the "
            "index lists; put the latest copy there, or shard the index again"
        )
    return store
