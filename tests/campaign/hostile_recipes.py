"""F5: recipes of strangers: paths, names, kinds and numbers that a run must not follow beyond what it was asked for.

A whole recipe of a tiny run gets one to three changes, and ``d2llm run`` works by it. It ends well or with one line and
exit code 2. Nothing is executed, written outside of the run's folder, or shown of a file or a variable that is no data.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from campaign.frame import Draw, Outcome, Row, main
from campaign.hostile_students import RAN, _Runs
from campaign.malformed_files import outcome_of
from campaign.verb_kills import run_command
from e2e.command_line import write_data, write_recipe
from tiny_models import write_tiny_model

SECRET, VARIABLE = "zorbleak", "D2LLM_TEST_SECRET"
SECONDS = 150.0
Change = Callable[[str, Path], str]


def _set(key: str, value: Any) -> Change:
    """Give the first setting of this name another value, or add it to ``[training]``."""

    def change(recipe: str, outside: Path) -> str:
        written = json.dumps(value).replace("OUTSIDE", str(outside))
        line = f"{key} = {written}".replace("\\", "\\\\")
        changed, count = re.subn(rf"^{re.escape(key)} = .*$", line, recipe, count=1, flags=re.MULTILINE)
        return changed if count else recipe.replace("[training]\n", f"[training]\n{key} = {written}\n")

    return change


def _section(text: str) -> Change:
    return lambda recipe, outside: f"{recipe}\n{text.replace('OUTSIDE', str(outside))}\n"


def _teacher(value: str) -> Change:
    def change(recipe: str, outside: Path) -> str:
        before, after = recipe.split("[teacher]\n")
        return f"{before}[teacher]\n{_set('model', value)(after, outside)}"

    return change


_REMOTE = '[teacher.remote]\nurl = "http://127.0.0.1:9/v1"\npatience_minutes = 0\napi_key_env = "{}"'
_PATHS = ("OUTSIDE/secret.txt", "OUTSIDE", "OUTSIDE/pipe", "OUTSIDE/loop", "/dev/zero", "/proc/self/environ", "..", "/")

HOSTILE: dict[str, Change] = {
    **{f"data at {path}": _set("path", path) for path in (*_PATHS, "http://127.0.0.1:9/a", "a\0b", "~nobody/x", "")},
    **{f"prompt at {path}": _set("prompt", path) for path in (*_PATHS, "OUTSIDE/prompt.toml", "x" * 5_000)},
    **{f"model at {path}": _set("model", path) for path in (*_PATHS, "OUTSIDE/code", "OUTSIDE/pickles", "--help")},
    **{f"teacher at {path}": _teacher(path) for path in (*_PATHS, "OUTSIDE/code", "OUTSIDE/pickles", "OUTSIDE/a.gguf")},
    "a name that leaves": _set("name", "../../escaped"),
    "a name of control characters": _set("name", "\x1b[31m\n\u202e" * 9),
    "a kind that is code": _section("[student.unknown]\nkind = \"__import__('os').mkdir('OUTSIDE/ran')\""),
    "a tuning that is code": _set("tuning", {"kind": "os.system"}),
    "a loss that is code": _section('[[losses]]\nkind = "os.system"'),
    "a tracker that is code": _set("trackers", ["os", "OUTSIDE/code/modeling_x.py"]),
    "a start elsewhere": _set("start", "OUTSIDE"),
    "labels elsewhere": _set("labels", "/dev/zero"),
    "an endpoint and a variable": _section(_REMOTE.format(VARIABLE)),
    "an endpoint and a variable that is none": _section(_REMOTE.format("A=B\\n")),
    "wide": _set("hidden_dim", 10**12),
    "very wide": _set("hidden_dim", 10**30),
    "many heads": _set("num_heads", 10**9),
    "long texts": _set("max_passage_tokens", 10**15),
    "large batches": _set("batch_queries", 10**15),
    "many negatives": _set("num_hard", 10**15),
    "a rank": _section("[student.backbone.x]\nrank = -1"),
    "a rate": _set("learning_rate", 1e308),
    "no rate": _set("learning_rate", -1.0),
    "a seed": _set("seed", 10**40),
    "deep": lambda recipe, outside: recipe + "\nx = " + "[" * 3_000 + "]" * 3_000,
    "a key twice": lambda recipe, outside: recipe + '\n[training]\nname = "a"\n',
    "not UTF-8": lambda recipe, outside: recipe + '\nx = "\udcff"',
}


def write_outside(outside: Path) -> None:
    """What recipes point at: secrets, a pipe, a loop, and models that would run code."""
    outside.mkdir()
    (outside / "secret.txt").write_text(f"the cat {SECRET}\n")
    (outside / "prompt.toml").write_text(f'[asymmetric]\ntemplate = "{SECRET} {{query.__class__}} {{passage}}"\n')
    os.mkfifo(outside / "pipe")
    (outside / "loop").symlink_to("loop")
    (outside / "a.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    for name in ("code", "pickles"):
        model = outside / name
        model.mkdir()
        config: dict[str, Any] = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}
        if name == "code":
            config |= {"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.C", "AutoModel": "modeling_x.M"}}
            (model / "modeling_x.py").write_text(f"import os\nos.mkdir({str(outside / RAN)!r})\n")
        (model / "config.json").write_text(json.dumps(config))
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(outside / RAN)))
        (model / "tokenizer.json").write_text("{}")


def follow(recipe: Path, out: Path, log: Path) -> None:
    """Run a recipe; an error that the command line shows in one line ends with 2."""
    with log.open("w") as file, redirect_stderr(file):
        try:
            run_command("run", recipe, "--out", out, "--dtype", "float32", "--device", "cpu")
        except RuntimeError as error:
            if str(error) != "exit status 2":
                raise


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    torch.set_num_threads(1)  # its threads would not be there in a fork
    os.environ[VARIABLE] = SECRET
    models, outside = folder / "models", folder / "outside"
    write_tiny_model(models / "encoder", "bert")
    write_tiny_model(models / "decoder", "llama")
    data = write_data(folder / "data")
    write_outside(outside)
    before = sorted(map(str, outside.rglob("*")))
    whole = write_recipe(folder / "whole.toml", models, data).read_text()

    def case(chance: Draw) -> Outcome:
        root = folder / f"{chance.getrandbits(64):x}"
        root.mkdir()
        names = sorted(chance.sample(sorted(HOSTILE), chance.choice([1, 1, 2, 3])))
        text = whole
        for name in names:
            text = HOSTILE[name](text, outside)
        (root / "recipe.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
        here = sorted(map(str, folder.iterdir()))
        said, fault = outcome_of(lambda: follow(root / "recipe.toml", root / "out", root / "log"), SECONDS)
        log = (root / "log").read_text(errors="replace") if (root / "log").exists() else ""
        errors = [line for line in log.splitlines() if line.startswith("error: ")]
        if not fault and (len(errors) > 1 or "Traceback" in log):
            fault = f"no one line: {log[-2_000:]}"
        if SECRET in log:
            fault = f"shows a secret: {log[-2_000:]}"
        if sorted(map(str, outside.rglob("*"))) != before:
            fault = "something ran, or was written outside"
        others = {path.name for path in root.iterdir()} - {"recipe.toml", "log"}
        if sorted(map(str, folder.iterdir())) != here or any(not name.startswith("out") for name in others):
            fault = f"files outside of the run's folder: {others}"
        shutil.rmtree(root)
        kind = "refused" if errors else said
        return Outcome(kind, fault and f"{names}: {fault}")

    yield case


ROW = Row("hostile_recipes", "F5", 300, prepare)

if __name__ == "__main__":
    main(ROW)
