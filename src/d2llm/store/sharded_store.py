"""A sharded index: a folder with a manifest that lists ordinary indexes, its shards, in folders or in object storage.

INDEX/
  manifest.json   kind "sharded index": student, formats, and the shards (``ShardRecord``), with a checksum
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
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from d2llm.core.errors import D2LLMError, DataFormatError, IndexMismatchError, InputError
from d2llm.core.files import MANIFEST_NAME, check_replaceable, new_folder
from d2llm.core.manifest import package_versions, read_manifest
from d2llm.core.shipped import name_student
from d2llm.core.types import MissingShard, PartKind, Passage
from d2llm.store.checksums import read_checked, write_checked
from d2llm.store.index_manifest import INDEX_FIELDS
from d2llm.store.index_manifest import SHARDED_KIND as KIND
from d2llm.store.index_spec import StoredSpec
from d2llm.store.index_store import IndexStore, check_maker
from d2llm.store.passage_table import PassageTable, Record
from d2llm.store.remote_shards import fetch_shard, is_url
from d2llm.store.schema import FieldType, MetadataSchema
from d2llm.store.storage import storage_errors
from d2llm.store.vector_formats import VectorFormat

FORMAT_VERSION = 1
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


class ShardedTable:
    """The tables of all shards as one, for what concerns single passages and documents."""

    def __init__(self, tables: Sequence[PassageTable]) -> None:
        self.tables = tables

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    @property
    def version(self) -> int:
        """The sum of the shards' versions, which grows with each change of a shard."""
        return sum(table.version for table in self.tables)

    def by_ids(self, ids: Sequence[str], names: Sequence[str]) -> list[Record]:
        """As of ``PassageTable``."""
        return [record for table in self.tables for record in table.by_ids(ids, names)]

    def batches(self, names: Sequence[str] | None = None) -> Iterator[list[Record]]:
        """As of ``PassageTable``."""
        return chain.from_iterable(table.batches(names) for table in self.tables)

    def parts(self, documents: Sequence[str]) -> list[tuple[str, str, int]]:
        """As of ``PassageTable``."""
        return [part for table in self.tables for part in table.parts(documents)]

    def pieces_of(self, documents: Sequence[str]) -> dict[str, list[str]]:
        """As of ``PassageTable``."""
        pieces = [table.pieces_of(documents) for table in self.tables]
        return {
            name: [one for each in pieces for one in each.get(name, ())]
            for name in documents
            if any(name in each for each in pieces)
        }

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields, which all shards have."""
        return self.tables[0].metadata


class Storage(Protocol):
    """What an index needs of the store of its passages, whether that is one (``IndexStore``) or sharded."""

    @property
    def folder(self) -> Path:
        """Its folder."""
        ...

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Student, task and formats."""
        ...

    @property
    def part_formats(self) -> Mapping[PartKind, VectorFormat]:
        """The formats of the vectors of parts, by kind."""
        ...

    @property
    def stores(self) -> Sequence[IndexStore]:
        """The stores that hold the passages."""
        ...

    @property
    def version(self) -> int:
        """The latest version."""
        ...

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields of the latest version."""
        ...

    @property
    def missing(self) -> Sequence[MissingShard]:
        """The shards that could not be opened."""
        ...

    def snapshots(self) -> list[str]:
        """The names of the snapshots."""
        ...

    def shard_of(self, passage: Passage) -> int:
        """Which of the stores a passage belongs in."""
        ...

    def table(self) -> PassageTable | ShardedTable:
        """The latest version of the table."""
        ...

    def writing(self) -> Any:
        """Hold the write lock, as a context; may be nested."""
        ...

    def check_student(self, fingerprint: str) -> None:
        """Raise an ``IndexMismatchError`` unless the student with this fingerprint made the vectors."""
        ...

    def add_fields(self, fields: MetadataSchema) -> None:
        """Add metadata fields that do not exist yet."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the passages with these ids; returns their number."""
        ...


class ShardedStore:
    """The stores of all shards. Methods are those of ``IndexStore``; a change is one commit in each shard it concerns.

    Readers may see a change in one shard before they see it in another. After an interruption, repeat the change.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        records: Sequence[ShardRecord],
        stores: Mapping[int, IndexStore],
        missing: Sequence[MissingShard] = (),
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.records = list(records)
        self.missing = tuple(missing)
        self._stores = dict(stores)

    @classmethod
    def create(
        cls, folder: Path, spec: StoredSpec, *, num_shards: int, metadata: MetadataSchema | None = None
    ) -> ShardedStore:
        """A new sharded index without passages in a folder that must not exist, or be empty.

        The folder appears when all shards are in it.

        Args:
            folder: where it goes.
            num_shards: number of shards.
            spec: what each shard is.
            metadata: fields with their types.

        Raises:
            InputError: the folder is not empty, the number of shards is not from 1 to 65,536, or a format is unknown.
            StorageError: it cannot be written.
        """
        if not 1 <= num_shards <= MAX_SHARDS:
            raise InputError(f"an index cannot have {num_shards:,} shards; give 1 to {MAX_SHARDS:,}")
        check_replaceable(folder, KIND)
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: already exists; open it (or give exist_ok=True), or give another folder")
        name = secrets.token_hex(8)
        with storage_errors(folder), new_folder(folder, kind=KIND) as draft:
            stores = {
                number: IndexStore.create(
                    draft / shard_name(number),
                    spec,
                    metadata=metadata,
                    shard={"number": number, "of": num_shards, "index": name},
                )
                for number in range(num_shards)
            }
            shared = {key: stores[0].manifest[key] for key in INDEX_FIELDS}
            manifest = {"kind": KIND, "format_version": FORMAT_VERSION, "packages": package_versions(), "index": name}
            records = [ShardRecord(shard_name(number), store.version, 0) for number, store in stores.items()]
            write_sharded_manifest(draft, manifest | shared, records)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path, *, allow_missing: bool = False) -> ShardedStore:
        """The sharded index in a folder.

        ``allow_missing``: shards that cannot be opened are left out and listed in ``missing``.

        Raises:
            DataFormatError: there is no sharded index, its manifest is damaged, or a shard is missing or damaged.
            IndexMismatchError: a shard belongs to another index, or was made by another student.
            InputError: a shard in object storage cannot be read.
            MissingExtraError: a shard is in object storage, but fsspec or what it needs for that is not installed.
        """
        manifest, records = read_sharded_manifest(folder)
        stores: dict[int, IndexStore] = {}
        missing: list[MissingShard] = []
        for number, record in enumerate(records):
            try:
                stores[number] = open_shard(folder, manifest, number, record, len(records))
            except D2LLMError as error:
                if not allow_missing:
                    raise
                missing.append(MissingShard(number, record.address, str(error)))
        if not stores:
            raise InputError(
                f"{folder}: none of its {len(records)} shards can be opened; the first: {missing[0].problem}"
            )
        return cls(folder, manifest, records, stores, missing)

    @property
    def stores(self) -> list[IndexStore]:
        """The stores of the shards that could be opened, in their order."""
        return list(self._stores.values())

    @property
    def numbers(self) -> list[int]:
        """The numbers of the shards that could be opened."""
        return list(self._stores)

    @property
    def part_formats(self) -> Mapping[PartKind, VectorFormat]:
        """The formats of the vectors of parts, by kind."""
        return self.stores[0].part_formats

    @property
    def version(self) -> int:
        """The sum of the shards' versions, which grows with each change of a shard."""
        return sum(store.version for store in self.stores)

    @property
    def metadata(self) -> MetadataSchema:
        """The metadata fields, which all shards have."""
        return self.stores[0].metadata

    def snapshots(self) -> list[str]:
        """The names of the snapshots of the whole: there are none, only those of each shard."""
        return []

    def shard_of(self, passage: Passage) -> int:
        """The number of the shard that a passage belongs in."""
        return shard_of(passage.id, passage.document_id, len(self.records))

    def table(self) -> ShardedTable:
        """The latest versions of the shards' tables."""
        return ShardedTable([store.table() for store in self.stores])

    def check_student(self, fingerprint: str) -> None:
        """Raise an ``IndexMismatchError`` unless the student with this fingerprint made the vectors."""
        check_maker(self.folder, self.manifest, fingerprint)

    @contextmanager
    def writing(self) -> Generator[None]:
        """Hold the write locks of all shards, and write their versions into the manifest at the end; may be nested.

        Raises:
            InputError: a shard is in object storage, or missing.
            IndexLockedError: another process is writing to a shard.
        """
        for missing in self.missing:
            raise InputError(
                f"{self.folder}: cannot be changed while shard {missing.number} is missing: {missing.problem}"
            )
        for number, record in enumerate(self.records):
            if is_url(record.address):
                raise InputError(
                    f"{self.folder}: shard {number} is in object storage ({record.address}), which is only read; "
                    "change the index that it was made from, and shard that again"
                )
        with self.locked():
            try:
                yield
            finally:
                self.save()

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the write locks of all shards."""
        with ExitStack() as locks:
            for store in self.stores:
                locks.enter_context(store.writing())
            yield

    def delete(self, ids: Sequence[str]) -> int:
        """Delete the passages with these ids, each from the shard that has it; returns their number."""
        with self.writing():
            return sum(store.delete(ids) for store in self.stores)

    def add_fields(self, fields: MetadataSchema) -> None:
        """Add metadata fields to all shards."""
        with self.writing():
            for store in self.stores:
                known = store.metadata.fields
                new: dict[str, FieldType] = {
                    name: kind for name, kind in fields.fields.items() if known.get(name) != kind
                }
                if new:
                    store.add_fields(MetadataSchema(new))

    def save(self) -> None:
        """Write the manifest with the current versions of the shards, if it has changed."""
        records = list(self.records)
        for number, store in self._stores.items():
            table = store.table()
            records[number] = replace(records[number], version=table.version, num_passages=len(table))
        if records != self.records:
            self.records = records
            write_sharded_manifest(self.folder, self.manifest, records)


def shard_name(number: int) -> str:
    """The name of a shard's folder."""
    return f"shard-{number:04}"


def is_sharded(folder: Path) -> bool:
    """Whether a folder holds a sharded index."""
    try:
        return read_checked(folder / MANIFEST_NAME, compare=False).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def open_storage(folder: Path, *, allow_missing: bool = False) -> IndexStore | ShardedStore:
    """The store in a folder, sharded or not.

    Raises:
        DataFormatError, IndexMismatchError, InputError: as for ``IndexStore.open`` and ``ShardedStore.open``.
    """
    return ShardedStore.open(folder, allow_missing=allow_missing) if is_sharded(folder) else IndexStore.open(folder)


def write_sharded_manifest(folder: Path, manifest: Mapping[str, Any], records: Iterable[ShardRecord]) -> None:
    """Write the manifest of a sharded index, atomically, with a checksum."""
    write_checked(folder / MANIFEST_NAME, {**manifest, "shards": [asdict(record) for record in records]})


def read_sharded_manifest(folder: Path) -> tuple[dict[str, Any], list[ShardRecord]]:
    """The manifest of a sharded index, without its shards, and the shards.

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
    if not records or not {"index", *INDEX_FIELDS} <= manifest.keys():
        raise DataFormatError(
            path, "does not describe a sharded index; restore it from a copy, or shard the index again"
        )
    return manifest, records


def open_shard(
    folder: Path, manifest: Mapping[str, Any], number: int, record: ShardRecord, num_shards: int
) -> IndexStore:
    """The store of one shard of the sharded index in a folder, with this manifest.

    Raises:
        DataFormatError, IndexMismatchError, InputError, MissingExtraError: as for ``ShardedStore.open``.
    """
    place = f"{folder}: shard {number} of {num_shards}"
    if is_url(record.address):
        path = fetch_shard(record.address, record.files, name=f"{manifest['index']}-{number}")
    else:
        path = folder / record.address
        if not path.is_dir():
            raise DataFormatError(
                path, f"is missing, but is {place}; put it back from a copy, or shard the index again"
            )
    store = IndexStore.open(path)
    if store.manifest["student"] != manifest["student"]:
        maker, other = (name_student(each["student"], each["student_source"]) for each in (manifest, store.manifest))
        raise IndexMismatchError(
            f"{place} in {record.address} was made by student {other}, but the index by {maker}; put the right shard "
            "there, or shard the index again"
        )
    own = store.manifest.get("shard")
    differing = [name for name in _COMPARED if store.manifest[name] != manifest[name]]
    if own != {"number": number, "of": num_shards, "index": manifest["index"]} or differing:
        what = "it is not the shard that was written there"
        if differing:
            what = f"it has another {', '.join(differing)}"
        raise IndexMismatchError(f"{place} in {record.address}: {what}; put the right shard there, or shard again")
    if store.version < record.version:
        raise IndexMismatchError(
            f"{place} in {record.address} is at version {store.version}, an older one than {record.version}, which the "
            "index lists; put the latest copy there, or shard the index again"
        )
    return store
