from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from d2llm.core import files
from d2llm.core.errors import InputError, ModelError
from d2llm.core.files import new_folder, replace_folder, write_bytes, write_json


class FullDiskError(OSError):
    """Stands for the system's error when a write fails."""


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def artifact(folder: Path, kind: str = "index", text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(f'{{"kind": "{kind}"}}')
    (folder / "data").write_text(text)
    return folder


# write_bytes, write_json


def test_bytes_are_written_into_folders_that_do_not_exist_yet(tmp_path: Path):
    write_bytes(tmp_path / "a" / "b" / "file", b"\x00content")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"\x00content"


def test_writing_replaces_the_file_without_leftovers(tmp_path: Path):
    path = tmp_path / "file"
    write_bytes(path, b"long old content")
    write_bytes(path, b"new")
    assert contents(tmp_path) == {"file": "new"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise FullDiskError

    monkeypatch.setattr(*((files.os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(FullDiskError):
        write_bytes(path, b"new")
    assert contents(tmp_path) == {"file": "old"}


def test_a_full_disk_is_named_with_the_file(tmp_path: Path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    code = f"""
import resource, signal
from pathlib import Path
from d2llm.core import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
try:
    files.write_bytes(Path({str(path)!r}), b"new" * 1000)
except OSError as error:
    print(error.filename, error.errno in files.TOO_LITTLE)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True)
    assert result.stdout == f"{path} True\n"
    assert contents(tmp_path) == {"file": "old"}


def test_a_process_killed_while_writing_leaves_the_old_content(tmp_path: Path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    code = f"""
import os, signal
from pathlib import Path
from d2llm.core import files
files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
files.write_bytes(Path({str(path)!r}), b"new" * 1000)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_permissions_follow_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"")
        with new_folder(tmp_path / "folder") as draft:
            write_bytes(draft / "inner", b"")
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder", "folder/inner")}
    assert modes == {"file": 0o640, "folder": 0o750, "folder/inner": 0o640}


def test_json_is_indented_text_with_a_final_newline(tmp_path: Path):
    write_json(tmp_path / "x.json", {"b": [1], "a": "é"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "b": [\n    1\n  ],\n  "a": "é"\n}\n'


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert contents(tmp_path) == {"x.json": "1\n"}


# new_folder


def test_a_new_folder_appears_only_when_the_block_ends(tmp_path: Path):
    target = tmp_path / "deep" / "index"
    with new_folder(target) as draft:
        assert draft.parent == target.parent
        (draft / "sub").mkdir()
        (draft / "sub" / "data").write_text("x")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/index/sub/data": "x"}


def test_the_old_folder_is_replaced_not_merged(tmp_path: Path):
    target = artifact(tmp_path / "index")
    with new_folder(target) as draft:
        (draft / "other").write_text("new")
        assert contents(target)["data"] == "old"
    assert contents(tmp_path) == {"index/other": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_old_folder_untouched(tmp_path: Path, error: type[BaseException]):
    target = artifact(tmp_path / "index")
    before = contents(tmp_path)
    with pytest.raises(error), new_folder(target) as draft:  # noqa: PT012
        (draft / "data").write_text("half")
        raise error
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize(
    ("told", "expected", "code"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28) at path /x"), OSError, errno.ENOSPC),
        (Exception("No space left on device (os error 28)"), OSError, errno.ENOSPC),  # of tokenizers
        (shutil.Error([("/a", "/b", "[Errno 28] No space left on device: '/a' -> '/b'")]), OSError, errno.ENOSPC),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, errno.ENOSPC),  # of NumPy
        (OSError(errno.EIO, "OpenVINO cannot write it"), OSError, errno.EIO),
        (SafetensorError("I/O error: is a directory (os error 21)"), SafetensorError, 0),
        (ModelError("weights cannot be read (os error 28)"), ModelError, 0),
    ],
)
def test_a_full_disk_is_named_whatever_library_meets_it(
    tmp_path, told: Exception, expected: type[Exception], code: int
):
    with pytest.raises(expected) as raised, new_folder(tmp_path / "student"):
        raise told
    if expected is OSError:
        assert (raised.value.errno, raised.value.filename) == (code, str(tmp_path / "student"))
    assert not [*tmp_path.iterdir()]


def test_an_error_inside_leaves_no_new_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="stop"), new_folder(tmp_path / "index"):
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_exchange_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = artifact(tmp_path / "index")
    before = contents(tmp_path)
    rename = Path.rename

    def fail_for_new_folder(path: Path, to: Path) -> Path:
        if ".new-" in path.name:
            raise FullDiskError
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_for_new_folder)
    with pytest.raises(FullDiskError), new_folder(target) as draft:
        (draft / "data").write_text("new")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_process_killed_while_filling_leaves_the_old_folder(tmp_path: Path):
    target = artifact(tmp_path / "index")
    before = contents(target)
    code = f"""
import os, signal
from pathlib import Path
from d2llm.core.files import new_folder
with new_folder(Path({str(target)!r})) as draft:
    (draft / "data").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert result.returncode == -signal.SIGKILL
    assert contents(target) == before
    with new_folder(target) as draft:
        (draft / "data").write_text("new")
    assert contents(target) == {"data": "new"}


def test_symbolic_links_are_followed(tmp_path: Path):
    target = artifact(tmp_path / "disk" / "index")
    (tmp_path / "link").symlink_to(target)
    with new_folder(tmp_path / "link") as draft:
        (draft / "data").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert contents(target) == {"data": "new"}
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["index"]


def test_an_empty_folder_may_be_filled(tmp_path: Path):
    (tmp_path / "index").mkdir()
    with new_folder(tmp_path / "index", kind="index") as draft:
        (draft / "data").write_text("new")
    assert contents(tmp_path) == {"index/data": "new"}


@pytest.mark.parametrize(
    ("file", "problem"), [("home/thesis.txt", "home: holds files that d2llm did not make"), ("home", "home: is a file")]
)
def test_foreign_files_are_never_replaced(tmp_path: Path, file: str, problem: str):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("years")
    with pytest.raises(InputError, match=problem), new_folder(tmp_path / "home"):
        raise AssertionError("the block must not run")
    assert contents(tmp_path) == {file: "years"}


@pytest.mark.parametrize("manifest", ['{"kind": "student"}', "{}", "[]", "{"])
def test_another_kind_of_artifact_is_never_replaced(tmp_path: Path, manifest: str):
    target = artifact(tmp_path / "out")
    (target / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match="which a 'index' would replace"), new_folder(target, kind="index"):
        raise AssertionError("the block must not run")
    assert contents(target) == {"data": "old", "manifest.json": manifest}


def test_the_same_kind_is_replaced(tmp_path: Path):
    target = artifact(tmp_path / "out", kind="index")
    with new_folder(target, kind="index") as draft:
        (draft / "data").write_text("new")
    assert contents(target) == {"data": "new"}


# replace_folder


def test_replace_folder_moves_a_finished_folder(tmp_path: Path):
    target = artifact(tmp_path / "target")
    source = artifact(tmp_path / "source", text="new")
    replace_folder(source, target)
    assert not source.exists()
    assert contents(target)["data"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
