"""F5: hostile folders of students: code, pickles, links, pipes, bombs and lies in each of their files.

A student of a few kilobytes is copied, changed in one to three ways, and loaded with torch and without, to encode a
query. It is read, or refused by an error of d2llm's. Nothing in it runs, and nothing outside of it is read into an
answer or changed. Of those of ``COSTLY`` alone, which are well formed and as large as they say, it may take over
30 seconds or 2 GiB: what a model costs is its maker's.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from campaign.frame import Draw, Outcome, Row, main
from campaign.malformed_files import outcome_of
from campaign.mutations import restructured
from d2llm.models.engines.lean import open_lean
from d2llm.models.student import Student
from d2llm.recipe import Full
from tiny_models import tiny_student_config, write_tiny_model

RAN = "ran"
Change = Callable[[Path, Path], None]


class _Runs:
    """What a pickle that is loaded does."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _edit(path: Path, **values: Any) -> None:
    if not path.is_file():
        raise FileNotFoundError(path)  # a pipe, by an earlier change
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(content | values))


def _config(**values: Any) -> Change:
    return lambda student, outside: _edit(student / "backbone" / "config.json", **values)


def _backbone(**values: Any) -> Change:
    def change(student: Path, outside: Path) -> None:
        path = student / "manifest.json"
        config = json.loads(path.read_text())["config"] if path.is_file() else {"backbone": {}}
        named = {name: str(value).replace("OUTSIDE", str(outside)) for name, value in values.items()}
        _edit(student / "manifest.json", config=config | {"backbone": config["backbone"] | named})

    return change


def _code(student: Path, outside: Path) -> None:
    code = f"import os\nos.mkdir({str(outside / RAN)!r})\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py", "sitecustomize.py"):
        (student / "backbone" / name).write_text(code)
        (student / name).write_text(code)
    _edit(
        student / "backbone" / "config.json",
        auto_map={"AutoConfig": "configuration_x.C", "AutoModel": "modeling_x.M", "AutoTokenizer": "tokenization_x.T"},
        model_type="x",
    )


def _pickles(student: Path, outside: Path) -> None:
    content = pickle.dumps(_Runs(outside / RAN))
    for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin", "head.bin", "training_args.bin", "scaler.pkl"):
        (student / name).write_bytes(content)
        (student / "backbone" / name).write_bytes(content)


def _disguised(student: Path, outside: Path) -> None:
    for path in student.rglob("*.safetensors"):
        path.unlink()
        path.write_bytes(pickle.dumps(_Runs(outside / RAN)))


def _header(value: dict[str, Any], body: bytes = bytes(16)) -> Change:
    def change(student: Path, outside: Path) -> None:
        del outside
        header = json.dumps(value).encode()
        (student / "head.safetensors").unlink()
        (student / "head.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)

    return change


def _link(name: str, target: str) -> Change:
    def change(student: Path, outside: Path) -> None:
        (student / name).unlink(missing_ok=True)
        (student / name).symlink_to(target.replace("OUTSIDE", str(outside)))

    return change


def _pipe(name: str) -> Change:
    def change(student: Path, outside: Path) -> None:
        del outside
        (student / name).unlink(missing_ok=True)
        os.mkfifo(student / name)

    return change


def _write(name: str, content: str | bytes) -> Change:
    def change(student: Path, outside: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (student / name).unlink(missing_ok=True)
        (student / name).write_bytes(data.replace(b"OUTSIDE", str(outside).encode()))

    return change


def _tokenizer(**values: Any) -> Change:
    return lambda student, outside: _edit(student / "backbone" / "tokenizer.json", **values)


_TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for a in range(10**9) %}x{% endfor %}"
_PATTERN = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
_TENSOR = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}

HOSTILE: dict[str, Change] = {
    "code": _code,
    "pickles": _pickles,
    "a pickle as safetensors": _disguised,
    "a module of another package": _write("modules.json", '[{"idx": 0, "name": "0", "path": "", "type": "os.system"}]'),
    "a link to a secret": _link("README.md", "OUTSIDE/secret.txt"),
    "a manifest elsewhere": _link("manifest.json", "OUTSIDE/secret.txt"),
    "a link to a device": _link("head.safetensors", "/dev/zero"),
    "a configuration without end": _link("backbone/config.json", "/dev/zero"),
    "a link to itself": _link("backbone/tokenizer.json", "tokenizer.json"),
    "a pipe as weights": _pipe("head.safetensors"),
    "a pipe as a manifest": _pipe("manifest.json"),
    "a pipe as a tokenizer": _pipe("backbone/tokenizer.json"),
    "a pipe as a configuration": _pipe("backbone/config.json"),
    "a pipe as values": _pipe("score_features.json"),
    "a backbone elsewhere": _backbone(model="OUTSIDE"),
    "a backbone at an address": _backbone(model="http://127.0.0.1:9/model"),
    "a backbone of dots": _backbone(model="../../../../etc"),
    "a backbone that is an option": _backbone(model="--help"),
    "a wide model": _config(hidden_size=2**31, intermediate_size=2**40),
    "a deep model": _config(num_hidden_layers=10**9),
    "a model of many words": _config(vocab_size=2**40),
    "a model of no heads": _config(num_attention_heads=0),
    "negative sizes": _config(hidden_size=-8, max_position_embeddings=-1),
    "sizes that are texts": _config(hidden_size="8" * 5_000, num_hidden_layers=None),
    "another architecture": _config(model_type="llama", architectures=["LlamaForCausalLM"]),
    "a quantised model": _config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "a number format that is none": _config(dtype="object", torch_dtype="object"),
    "a header that lies": _header({"a": _TENSOR}),
    "a header that overlaps": _header({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "abc"}),
    "a header of other names": _header({"x" * 5_000: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "a long header": _write("head.safetensors", b"\xff" * 7 + b"\x7f" + bytes(64)),
    "deep JSON": _write("backbone/tokenizer.json", "[" * 200_000),
    "deep settings": _write("backbone/tokenizer_config.json", '{"a":' * 100_000),
    "deep values": _write("term_weights.json", '{"a":' * 100_000),
    "a pattern that doubles": _tokenizer(pre_tokenizer=_PATTERN),
    "a normaliser that grows": _tokenizer(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}] * 8,
        }
    ),
    "words with numbers beyond the model": _tokenizer(
        added_tokens=[
            {"id": 2**31, "content": "the", "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
        ]
    ),
    "a template": _write("backbone/chat_template.jinja", _TEMPLATE),
    "settings with code": _write(
        "backbone/tokenizer_config.json",
        '{"tokenizer_class": "x", "auto_map": {"AutoTokenizer": ["OUTSIDE/x.T", null]}, "model_max_length": 1e400}',
    ),
    "an adapter elsewhere": _write(
        "adapter_config.json",
        '{"peft_type": "LORA", "base_model_name_or_path": "OUTSIDE", "auto_mapping": {"a": "os"}}',
    ),
    "a name that turns": _write("README.md", "\x1b]0;x\x07\u202e<script>"),
}


COSTLY = {"a deep model", "a pattern that doubles", "a normaliser that grows"}


def load(student: Path) -> None:
    """Load a student as programs do, with torch and without, and encode a query."""
    Student.load(student, device="cpu", dtype="float32").encode_queries(["the cat aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"])


def load_lean(student: Path) -> None:
    lean = open_lean(student)
    if lean is not None:
        lean.encode_queries(["the cat aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"])


def _changed(student: Path, names: list[str], outside: Path, chance: Draw) -> list[str]:
    for name in names:
        try:
            HOSTILE[name](student, outside)
        except (OSError, ValueError, RecursionError):
            continue  # an earlier change has taken that file away
    if chance.random() < 0.3:
        path = chance.choice(sorted(path for path in student.rglob("*.json") if path.is_file() and not path.is_fifo()))
        try:
            value = restructured(json.loads(path.read_text()), chance)
        except (OSError, ValueError, RecursionError):
            return names
        path.unlink()
        path.write_text(json.dumps(value))
        return [*names, f"{path.name} changed"]
    return names


@contextmanager
def prepare(folder: Path) -> Iterator[Callable[[Draw], Outcome]]:
    torch.set_num_threads(1)  # its threads would not be there in a fork
    whole = Student.create(
        tiny_student_config(write_tiny_model(folder / "bert", "bert"), tuning=Full()), dtype="float32"
    )
    whole.save(student := folder / "student")
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("the secret zorbleak")
    load(student)

    def case(chance: Draw) -> Outcome:
        listed = sorted(HOSTILE)
        names = [listed[chance.number % len(listed)], *chance.sample(listed, chance.choice([0, 0, 1, 2]))]
        copy = folder / f"{chance.getrandbits(64):x}"
        shutil.copytree(student, copy)
        names = _changed(copy, names, outside, chance)
        results = [outcome_of(lambda: load(copy)), outcome_of(lambda: load_lean(copy))]
        shutil.rmtree(copy)
        is_costly = not COSTLY.isdisjoint(names)
        faults = [fault for _, fault in results if fault and not (is_costly and fault.startswith(("over", "ended")))]
        if {path.name for path in outside.iterdir()} != {"secret.txt"}:
            faults.append(f"something ran: {[path.name for path in outside.iterdir()]}")
            shutil.rmtree(outside / RAN, ignore_errors=True)
        if "zorbleak" in str(results):
            faults.append("what is outside was shown")
        said = " and ".join(dict.fromkeys(kind for kind, _ in results))
        return Outcome(said, (faults and f"{names}: {faults}") or "")

    yield case


ROW = Row("hostile_students", "F5", 500, prepare)

if __name__ == "__main__":
    main(ROW)
