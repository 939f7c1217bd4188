"""Shards of labels, models in GGUF and standard input, as targets."""

from __future__ import annotations

import io
import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from campaign.guided_targets import Read, Target, json_of, lines_of

_KEY = {"teacher": "t", "prompt": "p", "dataset": "d", "query_id": "q"}
_PAIRS = [_KEY | {"passage_id": name, "log_odds": 0.5, "grade": None} for name in "ab"]
_COSINES = [_KEY | {"passage_ids": ["a", "b"], "gram": [1.0, 0.5, 0.5, 1.0]}]


def _parquet(rows: Any, kind: str) -> bytes:
    fields = [(name, pa.string()) for name in _KEY]
    if kind == "labels":
        fields += [("passage_id", pa.string()), ("log_odds", pa.float32()), ("grade", pa.float32())]
    else:
        fields += [("passage_ids", pa.list_(pa.string())), ("gram", pa.list_(pa.float32()))]
    table, file = pa.Table.from_pylist(rows, schema=pa.schema(fields)), io.BytesIO()
    pq.write_table(table, file, write_page_checksum=True)
    return file.getvalue()


def _read_labels(folder: Path) -> object:
    """All that is read from a store of labels."""
    from d2llm.data.label_sets import count_labels
    from d2llm.data.labels import LabelStore, label_keys

    count_labels(folder)
    for store in (LabelStore.of(folder, key) for key in label_keys(folder)):
        for query in store.query_ids:
            store.log_odds(query), store.grades(query), store.gram(query)
    return None


def _shard(folder: Path, name: str) -> Path:
    return folder / name / "0000000001-a.parquet"


def _label_store(folder: Path) -> Path:
    """A store of one shard."""
    from d2llm.core.manifest import write_manifest
    from d2llm.data.labels import _FORMAT_VERSION, KIND

    write_manifest(folder, KIND, _FORMAT_VERSION, {})
    for name, rows in (("labels", _PAIRS), ("grams", _COSINES)):
        _shard(folder, name).parent.mkdir()
        _shard(folder, name).write_bytes(_parquet(rows, name))
    return folder


def _label_bytes(folder: Path) -> Read:
    """The bytes of a file of a shard, the first of which says which file."""
    store = _label_store(folder)
    whole = {name: _shard(store, name).read_bytes() for name in ("labels", "grams")}

    def read(data: bytes) -> object:
        changed = "grams" if data[:1] > b"\x7f" else "labels"
        for name, content in whole.items():
            _shard(store, name).write_bytes(data[1:] if name == changed else content)
        return _read_labels(store)

    return read


def _label_rows(folder: Path) -> Read:
    """Rows, as JSON, that are well formed Parquet with the right columns."""
    store = _label_store(folder)

    def read(data: bytes) -> object:
        rows: Any = json_of(data)
        try:
            kind = "grams" if "gram" in rows[0] else "labels"
            content = _parquet(rows, kind)
        except (pa.ArrowException, LookupError, TypeError, AttributeError, ValueError, OverflowError):
            return None
        _shard(store, kind).write_bytes(content)
        return _read_labels(store)

    return read


def _gguf(folder: Path) -> Read:
    from d2llm.methods.backbones.gguf import GGUF

    path = folder / "a.gguf"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        with tempfile.TemporaryDirectory(dir=folder) as converted:
            GGUF.convert(path, Path(converted))

    return read


def _value(value: Any) -> bytes:
    """A value of GGUF's header, after its type."""
    match value:
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case _:
            values = [_value(item) for item in value]
            return (
                struct.pack("<I", 9) + values[0][:4] + struct.pack("<Q", len(values)) + b"".join(v[4:] for v in values)
            )


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def tiny_gguf() -> bytes:
    """A model of one layer in GGUF."""
    sizes = {"context_length": 32, "embedding_length": 8, "block_count": 1, "feed_forward_length": 16, "vocab_size": 8}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-5}
    header: dict[str, Any] = {"general.architecture": "llama"}
    header |= {f"llama.{name}": size for name, size in sizes.items()}
    words = ["<unk>", "<s>", "</s>", "a", "b", "\u2581a", "ab", "\u2581"]
    header |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": [0.0] * 8}
    header |= {"tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1], "tokenizer.ggml.bos_token_id": 1}
    shapes = {"token_embd": (8, 8), "output_norm": (8,), "output": (8, 8)}
    layer = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "attn_norm": (8,)}
    layer |= {"ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16), "ffn_norm": (8,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    content, at = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(header)), 0
    content += b"".join(_text(name) + _value(value) for name, value in header.items())
    for name, shape in shapes.items():
        content += (
            _text(f"{name}.weight") + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        )
        content += struct.pack("<IQ", 0, at)
        at += 4 * math.prod(shape)  # all are multiples of 32 bytes, as they must be
    return content + bytes(-len(content) % 32 + at)


def _standard_input(folder: Path) -> Read:
    """What is piped into a command, as documents and as queries: its type is known by its first bytes."""
    from d2llm.core.errors import D2LLMError
    from d2llm.core.files import copy_of_stream
    from d2llm.data.beir import read_queries
    from d2llm.data.file_contents import read_contents

    stream = folder / "stream"

    def read(data: bytes) -> object:
        stream.write_bytes(data)
        with tempfile.TemporaryDirectory(dir=folder) as copies:
            copy = copy_of_stream(stream, Path(copies))
            try:
                return read_contents(copy)
            except D2LLMError:
                return read_queries(copy)

    return read


def _gzipped(content: bytes) -> bytes:
    import gzip

    return gzip.compress(content, mtime=0)


_LINES = lines_of({"id": "1", "text": "the cat"}, {"id": "2", "text": "the dog", "metadata": {"year": 1}})

LABELS: dict[str, Target] = {
    "label shards": Target(_label_bytes, [b"\0" + _parquet(_PAIRS, "labels"), b"\xff" + _parquet(_COSINES, "grams")]),
    "label rows": Target(_label_rows, [json.dumps(rows).encode() for rows in (_PAIRS, _COSINES)], json=True),
    "gguf": Target(_gguf, [tiny_gguf()]),
    "standard input": Target(
        _standard_input, [_LINES, _gzipped(_LINES), b"<!doctype html><p>a", b"\xef\xbb\xbf{}"], json=True
    ),
}
