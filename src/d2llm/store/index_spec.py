"""What shapes an index: the settings of a new one, and what its manifest stores of them and of its student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from d2llm.core.settings import TRAINED_TASK, Settings, Shown, setting
from d2llm.core.types import Task

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "int3", "binary")
"""Names of the vector formats that ship (``vector_formats``)."""


class IndexShape(Settings):
    """What is asked of a new index and stored in its manifest as it is.

    Another such setting is another field here, and what acts on it, which finds it in the manifest of the store.
    """

    noun: ClassVar[str] = "setting of an index"

    vector_format: str = setting(
        "bfloat16",
        f"For a new index: {', '.join(FORMATS[:-1])} or {FORMATS[-1]} vectors.",
        Shown(option="vectors", metavar="FORMAT", default="bfloat16"),
    )
    vector_copies: int = setting(
        2,
        "For a new index: 1 stores vectors once and saves space; damaged ones must then be encoded again. 2 repairs "
        "them from the copy.",
        Shown(metavar="N", default="2"),
        ge=1,
        le=2,
    )

    approximate: bool = setting(
        True,
        "For a new index: from 20,000 passages on, build an approximate index when many are added, and search with it.",
    )

    def shape(self) -> dict[str, Any]:
        """These settings, without those of a subclass."""
        return {name: getattr(self, name) for name in IndexShape.model_fields}


class IndexSpec(IndexShape):
    """What a new index is to be; it cannot be changed later.

    Example:
        >>> from d2llm import Index, IndexSpec
        >>> Index.create("docs.index", "d2llm-minilm", IndexSpec(num_shards=2)).spec.num_shards
        2
    """

    task: Task | None = setting(
        None,
        "For a new index: search for passages that answer the query (asymmetric) or mean the same (symmetric).",
        TRAINED_TASK,
    )
    window_vectors: str | None = setting(
        "auto",
        "For a new index: also store a vector of each two neighbouring sentences, for example as int3; or none.",
        Shown(metavar="FORMAT", default="int3 if the student's score uses them"),
    )
    token_vectors: str | None = setting(
        "auto",
        "For a new index: also store a vector of each token, for example as int4; or none.",
        Shown(metavar="FORMAT", default="int4 if the student's score uses them"),
    )
    metadata: Mapping[str, Any] | None = setting(
        None,
        "Fields with their types; types of other fields are inferred from their values as they appear.",
        Shown(python_only=True),
    )
    num_shards: int | None = setting(
        None, "Make a sharded index of this many shards (store.shards).", Shown(python_only=True)
    )

    def differing(self, made: IndexSpec, *, only_given: bool = False) -> list[tuple[str, object, object]]:
        """What an index was made with that is not as it is here: name, value here, value there.

        ``only_given``: of the settings that were given here; of all otherwise.
        """
        names = self.given() if only_given else type(self).model_fields
        pairs = [(name, getattr(self, name), getattr(made, name)) for name in names if name != "metadata"]
        stored = made.metadata or {}
        pairs += [(f"metadata.{name}", kind, stored.get(name)) for name, kind in (self.metadata or {}).items()]
        return [(name, ours, theirs) for name, ours, theirs in pairs if ours not in (theirs, "auto", theirs or "none")]


class StoredSpec(IndexShape):
    """What the manifest of an index stores of its shape and its student."""

    student: str = setting(..., "Fingerprint of the student.")
    dim: int = setting(..., "Dimensions of its vectors.", ge=1)
    student_config: Mapping[str, Any] = setting({}, "Its configuration.")
    student_source: str | None = setting(None, "Where it can be loaded from.")
    task: Task = setting("asymmetric", "The default task of searches.")
    window_format: str | None = setting(None, "How vectors of windows are stored; None stores none.")
    token_format: str | None = setting(None, "How token embeddings are stored; None stores none.")
    token_dim: int | None = setting(None, "Dimensions of the token embeddings.")
    token_projection: str | None = setting(None, "Fingerprint of what made the token embeddings.")
    document_expansion: str | None = setting(None, "Fingerprint of what adds words to the passages; None adds none.")

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, Any]) -> StoredSpec:
        """The part of an index's manifest that every shard shares."""
        return cls(**{name: manifest[name] for name in cls.model_fields if name in manifest})

    def as_asked(self, metadata: Mapping[str, Any], num_shards: int | None) -> IndexSpec:
        """The settings that make such an index."""
        return IndexSpec(
            **self.shape(),
            task=self.task,
            window_vectors=self.window_format,
            token_vectors=self.token_format,
            metadata=metadata,
            num_shards=num_shards,
        )
