"""What is published: the wheel of d2llm, which has no trained models, and those of the packages that have them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from d2llm.core.errors import ModelNotFoundError
from d2llm.core.shipped import PACKAGES, find_shipped, shipped_models
from d2llm.models.downloads import find_saved
from d2llm.models.hub import find_student
from d2llm.models.sources import is_student

MODEL_PACKAGES = sorted({package for packages in PACKAGES.values() for package in packages.values()})


def build_wheel(source: Path, folder: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_the_wheel_of_d2llm_is_small_and_has_no_weights(repository: Path, tmp_path: Path):
    wheel = build_wheel(repository, tmp_path)
    names = set(wheel.namelist())
    assert Path(str(wheel.filename)).stat().st_size < 15e6
    assert not [name for name in names if name.endswith((".safetensors", ".gguf", ".bin", ".onnx"))]
    assert {"d2llm/py.typed", "d2llm/shipped/recipes/d2llm.toml", "d2llm/models/teachers/prompts/__init__.py"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    source = repository / "src"
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names


@pytest.mark.parametrize("package", MODEL_PACKAGES)
def test_a_package_of_models_has_all_files_of_its_models(repository: Path, tmp_path: Path, package: str):
    names = set(build_wheel(repository / "packages" / package, tmp_path).namelist())
    source = repository / "packages" / package / "src"
    assert {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()} <= names
    assert "d2llm_models/__init__.py" not in names  # or the other packages would be hidden


@pytest.mark.parametrize("kind", PACKAGES)
def test_every_model_is_in_the_package_that_errors_name(repository: Path, kind):
    folders = (repository / "packages").glob(f"*/src/d2llm_models/{kind}/*")
    assert {folder.name: folder.parents[3].name for folder in folders} == PACKAGES[kind]
    assert shipped_models(kind).keys() >= PACKAGES[kind].keys()


def test_without_its_package_a_model_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("d2llm.core.shipped.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"'d2llm-minilm' is in a package .*: pip install d2llm-models-minilm"):
        find_student("d2llm-minilm")
    with pytest.raises(ModelNotFoundError, match=r"pip install d2llm-models-multilingual"):
        is_student(Path("d2llm-multilingual"))
    with pytest.raises(ModelNotFoundError, match=r"pip install d2llm-models-smollm2"):
        find_saved("smollm2-writer", "writers")
    assert find_saved("d2llm-minilm", "writers") is None  # is no writer
    with pytest.raises(ModelNotFoundError, match=r"one of the shipped students: .*did you mean 'd2llm-minilm'"):
        find_student("d2llm-minilmm")


def test_others_may_publish_students(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    theirs = tmp_path / "d2llm_models" / "students" / "their-student"
    theirs.mkdir(parents=True)
    (theirs / "manifest.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_shipped("their-student", "students") == theirs
    assert "d2llm-minilm" in shipped_models("students")
