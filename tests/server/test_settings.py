from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main

pytest.importorskip("fastapi", reason="needs the extra 'serve'")

from d2llm.cli.main import app
from d2llm.cli.options import parse_assignments
from d2llm.core.errors import InputError
from d2llm.core.settings import is_shown
from d2llm.server.settings import LOOPBACK_NAMES, LoadedSettings, ServeSettings, is_loopback, load_settings
from e2e.command_line import succeed_with_report


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch):
    import os

    for name in [name for name in os.environ if name.upper().startswith("D2LLM_SERVE_")]:
        monkeypatch.delenv(name)


def toml(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text, encoding="utf-8")
    return path


def source_and_value(loaded: LoadedSettings, name: str) -> tuple[str, Any]:
    return loaded.sources[name], getattr(loaded.settings, name)


# Sources of values and their precedence


def test_flags_win_over_the_environment_which_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = toml(tmp_path, "port = 1001\nmax_texts = 11\nmax_top_k = 21\n")
    monkeypatch.setenv("D2LLM_SERVE_PORT", "1002")
    monkeypatch.setenv("D2LLM_SERVE_MAX_TEXTS", "12")
    loaded = load_settings({"port": 1003, "host": None}, file=file)
    assert source_and_value(loaded, "port") == ("--port", 1003)
    assert source_and_value(loaded, "max_texts") == ("environment D2LLM_SERVE_MAX_TEXTS", 12)
    assert source_and_value(loaded, "max_top_k") == (f"file {file}", 21)
    assert source_and_value(loaded, "host") == ("default", "127.0.0.1")


def test_set_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("D2LLM_SERVE_MAX_TEXTS", "12")
    loaded = load_settings(assignments=parse_assignments(["max-texts=13"]))
    assert source_and_value(loaded, "max_texts") == ("--set", 13)


def test_serve_settings_ignore_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("D2LLM_SERVE_PORT", "1002")
    assert ServeSettings().port == 8000


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("D2LLM_SERVE_PORT", "")
    assert source_and_value(load_settings(), "port") == ("default", 8000)


@pytest.mark.parametrize("text", ["a.example, b.example", "a.example,b.example,"])
def test_lists_are_comma_separated(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("D2LLM_SERVE_ALLOWED_HOSTS", text)
    assert load_settings().settings.allowed_hosts == ("a.example", "b.example")


def test_a_file_may_contain_lists(tmp_path: Path):
    file = toml(tmp_path, 'allowed_hosts = ["a.example"]\nkeys_file = "keys.json"\n')
    settings = load_settings(file=file).settings
    assert settings.allowed_hosts == ("a.example",)
    assert settings.keys_file == Path("keys.json")


# Indexes by name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Path("a/docs.index"), {"docs.index": "a/docs.index"}),
        ("a/docs.index, faq=b/docs.index", {"docs.index": "a/docs.index", "faq": "b/docs.index"}),
        (["b", "a"], {"b": "b", "a": "a"}),  # in this order
        (["runs/lr=1/a"], {"a": "runs/lr=1/a"}),
        (["faq=runs/lr=1/a, b"], {"faq": "runs/lr=1/a, b"}),  # a list's items are not split
        ({"faq": "b"}, {"faq": "b"}),
        (None, {}),
    ],
)
def test_an_index_has_its_folders_name_unless_another_is_given(value: object, expected: dict[str, str]):
    folders = load_settings({"index": value}).settings.index
    assert list(folders.items()) == [(name, Path(folder)) for name, folder in expected.items()]


def test_the_current_folder_is_named_like_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert load_settings({"index": [".", "lr=1"]}).settings.index == {tmp_path.name: Path(), "lr=1": Path("lr=1")}


def test_indexes_come_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = toml(tmp_path, '[index]\ndocs = "a"\nfaq = "b"\n')
    loaded = load_settings(file=file)
    assert source_and_value(loaded, "index") == (f"file {file}", {"docs": Path("a"), "faq": Path("b")})
    assert (
        dict(zip(("index", "value", "from"), loaded.lines()[0], strict=True))["value"] == '{"docs" = "a", "faq" = "b"}'
    )
    monkeypatch.setenv("D2LLM_SERVE_INDEX", "a,c=b")
    assert load_settings(file=file).settings.index == {"a": Path("a"), "c": Path("b")}
    assert load_settings({"index": ["d"]}).settings.index == {"d": Path("d")}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a/docs", "b/docs"], r"INDEX: index: two indexes are named 'docs' \(a/docs and b/docs\); .* docs-2=b/docs"),
        (["faq=a", "faq=b"], "two indexes are named 'faq'"),
        (["/"], "INDEX: index is "),
        ({"a/b": "c"}, "INDEX: index is "),
        (3, "write FOLDER or NAME=FOLDER"),
    ],
)
def test_indexes_need_different_names(value: object, message: str):
    with pytest.raises(InputError, match=message):
        load_settings({"index": value})


# Invalid settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "file {file}: unknown setting 'prot'; did you mean 'p"),
        ("max_text = 1", "file {file}: unknown setting 'max_text'; did you mean 'max_texts'?"),
        ("[zzz]", "file {file}: unknown setting 'zzz'; known settings: allow_missing_shards, "),
        ('port = "x"', "file {file}: port is 'x' (str), but must be a whole number"),
        ("port = true", "file {file}: port is True (bool), but must be a whole number"),
        ("port = 70000", "file {file}: port is 70000, but must be at most 65535"),
        (
            'engine = "jax"',
            (
                "file {file}: engine is 'jax' (str), but must be 'auto', 'torch', 'onnx', 'onnx-int8', 'openvino' or "
                "'openvino-int8'"
            ),
        ),
        ("port = ", "{file}: not valid TOML"),
        (f"port = {'[' * 5_000}", "{file}: not valid TOML"),
        (f"port = {'9' * 5_000}", "{file}: not valid TOML"),
    ],
)
def test_a_bad_file_is_an_error_that_names_key_and_file(tmp_path: Path, text: str, message: str):
    file = toml(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_settings(file=file)
    assert message.format(file=file) in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        load_settings(file=tmp_path / "none.toml")


def test_bad_variables_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("D2LLM_SERVE_MAX_TEXTS", "many")
    with pytest.raises(InputError, match=r"environment D2LLM_SERVE_MAX_TEXTS: max_texts is 'many' .*whole number"):
        load_settings()
    monkeypatch.delenv("D2LLM_SERVE_MAX_TEXTS")
    monkeypatch.setenv("D2LLM_SERVE_WRITEABLE", "no")
    with pytest.raises(InputError, match="D2LLM_SERVE_WRITEABLE: unknown setting 'writeable'; did you mean 'writable'"):
        load_settings()


def test_all_bad_values_are_reported_at_once(tmp_path: Path):
    with pytest.raises(InputError) as error:
        load_settings({"port": -1}, file=toml(tmp_path, "max_texts = 0"))
    assert "--port: port is -1" in str(error.value)
    assert "serve.toml: max_texts is 0" in str(error.value)


@pytest.mark.parametrize(
    ("assignments", "message"), [(["max_texts"], "write --set NAME=VALUE"), (["port=1", "port=2"], "port: given twice")]
)
def test_assignments_are_checked(assignments: list[str], message: str):
    with pytest.raises(InputError, match=message):
        parse_assignments(assignments)


def test_an_option_and_set_for_one_setting_are_an_error():
    with pytest.raises(InputError, match="port: given twice, as an option and by --set"):
        load_settings({"port": 1}, assignments={"port": "2"})


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("allowed_hosts", "a.example,*.b_c.example,*,::1,[::1],10.0.0.1", "a.example:80 https://a.example 10.0.0.1:80"),
        (
            "cors_origins",
            "https://a.example,http://[::1]:80,null,*",
            "a.example https://a.example/ https://a.example/b",
        ),
        ("trusted_proxies", "10.0.0.1,10.0.0.0/8,::1,*", "nginx 10.0.0.1/8 10.0.0.1:80"),
    ],
)
def test_addresses_that_match_no_request_are_errors(name: str, good: str, bad: str):
    assert getattr(load_settings(assignments={name: good}).settings, name) == tuple(good.split(","))
    for value in bad.split():
        with pytest.raises(InputError, match=f"--set: {name}: write "):
            load_settings(assignments={name: f"{good},{value}"})


def test_settings_of_a_writer_need_one():
    with pytest.raises(InputError, match="writer_endpoint needs writer"):
        load_settings(assignments={"writer_endpoint": "http://127.0.0.1:8000/v1"})
    with pytest.raises(InputError, match="writer_key_env is about an endpoint"):
        load_settings({"writer": "smollm2"}, assignments={"writer_key_env": "KEY"})


@pytest.mark.parametrize("name", ["teacher", "reranker", "writer"])
def test_a_teacher_reranker_or_writer_needs_an_index(name: str):
    with pytest.raises(InputError, match=f"a {name} works on searches, and there is no index to search"):
        load_settings({"student": "d2llm-minilm", name: "smollm2"})
    assert getattr(load_settings({"index": ["docs.index"], name: "smollm2"}).settings, name) == "smollm2"


# Reachable addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_hosts(host: str):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_hosts_reachable_from_outside(host: str):
    assert not is_loopback(host)


def test_public_hosts_need_keys_or_explicit_consent(tmp_path: Path):
    with pytest.raises(InputError, match=r"host '0\.0\.0\.0' can be reached from other machines.*d2llm keys"):
        load_settings({"host": "0.0.0.0"})
    assert load_settings({"host": "0.0.0.0", "keys_file": tmp_path / "keys.json"}).settings.host == "0.0.0.0"
    assert load_settings({"host": "0.0.0.0"}, assignments={"allow_unauthenticated": "yes"}).settings.host == "0.0.0.0"


def test_the_listening_address_is_an_allowed_host():
    assert ServeSettings(host="10.0.0.1", allow_unauthenticated=True).host_names == (*LOOPBACK_NAMES, "10.0.0.1")
    assert ServeSettings(host="0.0.0.0", allow_unauthenticated=True).host_names == LOOPBACK_NAMES


# The command line


def test_the_options_of_serve_are_those_of_the_settings():
    options = {each.name: each for each in typer.main.get_command(app).commands["serve"].params}
    shown = {name: field for name, field in ServeSettings.model_fields.items() if is_shown(field)}
    assert options.keys() - shown.keys() == {"index", "config", "assignments", "show_config", "json_path"}
    assert len(shown) > 10
    for name, field in shown.items():
        assert options[name].default is None  # environment and file decide
        assert field.description in options[name].help


def test_show_config_shows_values_and_sources_without_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("D2LLM_SERVE_TEACHER", "remote:http://me:hunter2@models.example/v1")
    arguments = ("serve", "docs.index", "--port", 9, "--config", toml(tmp_path, "log_texts = true"), "--show-config")
    result, report = succeed_with_report(*arguments, folder=tmp_path)
    rows = {cells[0]: cells[1:] for line in result.stdout.splitlines() if len(cells := line.split("\t")) == 3}
    assert rows["port"] == ["9", "--port"]
    assert rows["index"][1] == "INDEX"
    assert rows["log_texts"][0] == "true"
    assert "***@models.example" in rows["teacher"][0]
    assert "hunter2" not in result.stdout
    assert set(rows) >= set(ServeSettings.model_fields)
    assert report["result"]["settings"]["port"] == 9
    assert report["result"]["sources"]["port"] == "--port"
