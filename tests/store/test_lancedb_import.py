"""LanceDB is imported without its service client, which is imported on first access."""

from __future__ import annotations

import subprocess
import sys

import pytest

from d2llm.store.lancedb_import import defer_import


def printed_words(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_lancedb_does_not_import_the_client_api():
    code = """
import sys
from d2llm.store.lancedb_import import import_lancedb
import_lancedb()
print(*(name for name in sys.modules if name.startswith("lance_namespace_urllib3_client.api")))
"""
    assert printed_words(code) == []


def test_the_client_is_complete_on_first_access():
    code = """
from d2llm.store.lancedb_import import import_lancedb
import_lancedb()
import lance_namespace_urllib3_client as client
from lance_namespace_urllib3_client import ApiClient, BranchApi
import lance_namespace
print(ApiClient.__module__, BranchApi.__module__, client.__version__ != "", hasattr(client, "nothing"))
print(client.DescribeTableRequest is lance_namespace.DescribeTableRequest)
"""
    package = "lance_namespace_urllib3_client"
    assert printed_words(code) == [f"{package}.api_client", f"{package}.api.branch_api", "True", "False", "True"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "deferred_example"
    folder.mkdir()
    (folder / "__init__.py").write_text("from deferred_example.part import value\nname = value + 1\n")
    (folder / "part.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "deferred_example"
    for name in ("deferred_example", "deferred_example.part"):
        sys.modules.pop(name, None)


def test_a_submodule_is_imported_before_its_package(package):
    defer_import(package)
    from deferred_example.part import value

    assert value == 1
    assert "name" not in vars(sys.modules[package])
    assert sys.modules[package].name == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = sys.modules[package].nothing


def test_imported_and_missing_packages_are_left_alone(package):
    import deferred_example as whole

    defer_import(package)
    assert sys.modules[package] is whole
    defer_import("no_package_of_this_name")
    assert "no_package_of_this_name" not in sys.modules
