"""The words of a language that BM25 counts where a corpus is small: a damaged file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2llm.core.errors import DataFormatError
from d2llm.store.background_words import BackgroundWords


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + b"\x16" + bytes(17), b"PK\x03\x04" + bytes(40), b"x" * 99])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "words.npz").write_bytes(content)
    with pytest.raises(DataFormatError, match=r"words\.npz: cannot be read .*install d2llm again"):
        BackgroundWords.read(tmp_path / "words.npz")
