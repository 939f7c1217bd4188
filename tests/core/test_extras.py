from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from d2llm.core import extras
from d2llm.core.errors import D2LLMError, MissingExtraError
from d2llm.core.extras import require


def test_an_installed_module_is_returned():
    assert require("json", extra="train", purpose="nothing") is json
    assert require("os.path", extra="train", purpose="nothing").join("a", "b") == "a/b"


@pytest.mark.parametrize("module", ["no_such_package_xyz", "no_such_package_xyz.inner", "json.no_such_module"])
def test_a_missing_module_error_names_the_install_command(module: str):
    with pytest.raises(MissingExtraError) as error:
        require(module, extra="train", purpose="LoRA tuning")
    message = str(error.value)
    assert message == f"LoRA tuning needs the package '{module}', which is not installed: pip install 'd2llm[train]'"
    assert "\n" not in message
    assert isinstance(error.value, D2LLMError)
    assert isinstance(error.value, ImportError)


def test_a_broken_module_is_not_reported_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_package_xyz.py").write_text("import no_such_package_xyz")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError) as error:
        require("broken_package_xyz", extra="ray", purpose="clusters")
    message = str(error.value)
    assert "installed but cannot be imported" in message
    assert "no_such_package_xyz" in message
    assert "pip install --upgrade 'd2llm[ray]'" in message


def test_openvino_does_not_report_its_use(tmp_path: Path):
    """It would write an id into the home folder and send an event when it is imported."""
    if find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    code = (
        "import sys; from d2llm.core.extras import require_openvino; "
        "require_openvino('a test').Core(); print('openvino_telemetry' in sys.modules)"
    )
    source = str(Path(extras.__file__).parents[2])
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": source}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    assert list(tmp_path.iterdir()) == []
