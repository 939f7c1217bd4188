"""``d2llm push`` to a fake Hub: only the HTTP transport is replaced."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from d2llm.models.hub import find_student
from e2e.command_line import d2llm, fail, succeed_with_report
from fake_hub import OWNER_TOKEN, FakeHub

STUDENT = "d2llm-minilm-cosine"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    set_client_factory(fake.client)
    yield fake
    set_client_factory(default_client_factory)


def test_a_pushed_student_can_be_loaded_by_name(hub, tmp_path):
    result, report = succeed_with_report("push", STUDENT, "me/mine", "--private", folder=tmp_path)
    assert report["result"]["url"].startswith("https://huggingface.co/me/mine/commit/")
    num_files = len(hub.repositories["me/mine"].files("main")) - 1  # the Hub adds .gitattributes itself
    assert report["result"]["num_files"] == num_files > 6
    assert f"{num_files} files" in result.stderr
    assert OWNER_TOKEN not in result.output + (tmp_path / "report.json").read_text()
    assert hub.repositories["me/mine"].private
    assert find_student("me/mine") != find_student(STUDENT)


def test_a_missing_licence_is_a_warning(hub, tmp_path):
    folder = shutil.copytree(find_student(STUDENT), tmp_path / "student")
    (folder / "README.md").unlink()
    assert "no licence is named" in d2llm("push", folder, "me/mine").stderr
    assert "no licence is named" not in d2llm("push", folder, "me/mine", "--license", "mit").stderr


def test_errors_are_one_paragraph(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_somebody_else")
    fail("push", STUDENT, "me/mine", containing=["'me/mine' on the Hub cannot be written", "log in"])
