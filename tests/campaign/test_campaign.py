"""A few cases of each row of the campaign, and that its checkers can find what they look for."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from campaign import (
    changing_files,
    frame,
    full_disks,
    guided_files,
    histories,
    hostile_folders,
    hostile_recipes,
    hostile_students,
    invariances,
    keys,
    malformed_files,
    malformed_requests,
    namespaces,
    power_cuts,
    ray_faults,
    ray_heads,
    ray_splits,
    soak,
    starved_server,
    store_kills,
    surroundings,
    verb_kills,
)
from campaign.guided_process import TARGETS, Watched
from campaign.guided_targets import Target
from campaign.histories import Call, is_linearizable
from campaign.power_cuts import Disk, File
from campaign.table import PAGE, page_with_table
from examples import TESTS_ALL

ROWS = {
    changing_files.ROW: 4,
    full_disks.ROW: 3,
    guided_files.ROW: 1,
    histories.ROW: 4,
    hostile_folders.ROW: 3,
    hostile_recipes.ROW: 4,
    hostile_students.ROW: 5,
    invariances.ROW: 75,
    keys.ROW: 1,
    malformed_files.ROW: 20,
    malformed_requests.ROW: 100,
    power_cuts.ROW: 20,
    ray_faults.ROW: 2,
    ray_heads.ROW: 1,
    ray_splits.ROW: 1,
    soak.ROW: 500,
    starved_server.ROW: 3,
    store_kills.ROW: 12,
    surroundings.ROW: 4,
    verb_kills.ROW: 2,
}
"""How many cases of a full run are drawn here."""
if TESTS_ALL:
    ROWS |= {
        invariances.ROW: 200,
        malformed_files.ROW: 40,
        malformed_requests.ROW: 200,
        soak.ROW: 1_000,
        surroundings.ROW: 10,
    }
pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize(("row", "count"), ROWS.items(), ids=[row.name for row in ROWS])
def test_a_few_cases(row: frame.Row, count: int, tmp_path: Path):
    if row is power_cuts.ROW and shutil.which("cc") is None:
        pytest.skip("needs a C compiler, cc")
    if row is guided_files.ROW and guided_files.why_not():
        pytest.skip(guided_files.why_not())
    if row in {full_disks.ROW, ray_heads.ROW, ray_splits.ROW} and namespaces.why_not():
        pytest.skip(f"no namespaces: {namespaces.why_not()}")
    if row in {ray_faults.ROW, ray_heads.ROW, ray_splits.ROW}:
        pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'd2llm[ray-serve]'")
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", f"campaign.{row.name}", "--count", str(count), "--seed", "7", "--json", path]
    variables = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    ended = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stdout[-5_000:] + ended.stderr[-5_000:]
    assert json.loads(path.read_text())["reached"] >= count


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")
def test_a_store_that_does_not_sync_its_table_loses_commits(monkeypatch: pytest.MonkeyPatch):
    read = power_cuts.read_log

    def without_syncs(path: Path) -> list[power_cuts.Call]:
        return [call for call in read(path) if call.name != "sync" or "passages.db" not in call.path]

    monkeypatch.setattr(power_cuts, "read_log", without_syncs)
    assert frame.run(power_cuts.ROW, 2, seed=7).faults


def test_memory_that_requests_keep_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    draw, kept = malformed_requests.draw, list[bytes]()

    def keeping(*given: Any) -> Any:
        kept.append(b"x" * (1 << 20))
        return draw(*given)

    monkeypatch.setattr(malformed_requests, "draw", keeping)
    (fault,) = frame.run(malformed_requests.ROW, 100, seed=7).faults.values()
    assert re.fullmatch(r"1\d\d MiB more memory", fault)


def test_what_a_parser_raises_is_a_fault_unless_it_says_so(tmp_path: Path):
    """Once for each place, with the input."""
    faults = tmp_path / "faults.jsonl"
    target = Target(lambda _: lambda data: int(data), [b"5"], expected=["ValueError"])
    call = Watched(target, target.make(tmp_path), faults)
    call(b"5")
    call(b"x")
    assert not faults.exists()
    call = Watched(Target(target.make, target.seeds), target.make(tmp_path), faults)
    call(b"x")
    call(b"y")
    (line,) = faults.read_text().splitlines()
    assert json.loads(line)["kind"] == "ValueError"
    assert len(TARGETS) > 50


def test_every_script_is_a_row():
    scripts = {path.stem for path in Path(__file__).parent.glob("*.py") if "\nROW = Row(" in path.read_text()}
    assert scripts == {row.name for row in ROWS}


def test_a_run_continues_where_it_ended(tmp_path: Path):
    seen: list[float] = []

    class Prepared:
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self, chance: random.Random) -> frame.Outcome:
            seen.append(chance.random())
            if len(seen) == 2:
                raise ValueError("not expected")
            return frame.Outcome("fine")

    row = frame.Row("none", "F0", 3, lambda _: Prepared())
    path = tmp_path / "none.json"
    frame.run(row, 2, path=path)
    result = frame.run(row, 3, path=path)
    assert len({*seen}) == len(seen) == result.reached == 3
    assert result.kinds == {"fault": 1, "fine": 2}
    assert "ValueError: not expected" in result.faults["1"]
    assert str(Path(__file__).parents[2]) not in path.read_text()
    assert frame.run(row, 1, path=path, seed=2).reached == 1


UPSERT = Call("upsert", {"a": "1", "b": "1"}, None, 0, 5)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([UPSERT, Call("get", ["a"], {}, 6, 7)], False),  # a lost write
        ([UPSERT, Call("get", ["a"], {}, 4, 7)], True),
        ([UPSERT, Call("get", ["a"], {"a": "1"}, 1, 2), Call("search", None, {}, 3, 4)], False),  # went back in time
        ([UPSERT, Call("search", None, {"a": "1"}, 6, 7)], False),  # half a commit
        ([UPSERT._replace(ended=float("inf")), Call("get", ["a"], {}, 6, 7)], True),  # of a killed process
        ([UPSERT, Call("delete", ["a"], 0, 6, 7)], False),
        ([UPSERT, Call("delete", ["a"], 1, 6, 7), Call("search", None, {"b": "1"}, 8, 9)], True),
        ([Call("verify", None, ["a problem"], 0, 1)], False),
    ],
)
def test_what_is_linearizable(calls: list[Call], expected: bool):
    assert is_linearizable(calls) is expected


def test_what_a_power_cut_leaves(tmp_path: Path):
    """Without a sync, nothing is certain; with it, everything is. A lost name takes its file with it."""
    (tmp_path / "old").write_bytes(b"old")
    disk = Disk(tmp_path)
    new = power_cuts.Call("write", "new", "", 0, b"abc")
    for call in [new._replace(name="create"), new, new._replace(path="old")]:
        disk.do(call)
    lost = [disk.after_a_cut(random.Random(seed)) for seed in range(40)]
    assert {"new" in names for names in lost} == {True, False}
    file = disk.names["old"]
    assert isinstance(file, File)
    assert (file.content(lambda: False), file.content(lambda: True)) == (b"old", b"abc")
    for path, name in (("old", "sync"), ("new", "sync"), (".", "sync-folder")):
        disk.do(power_cuts.Call(name, path, "", 0, b""))
    kept = [disk.after_a_cut(random.Random(seed)) for seed in range(20)]
    assert all("new" in names for names in kept)
    assert file.content(lambda: False) == b"abc"


def test_the_page_says_what_was_reached():
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page), "run: PYTHONPATH=tests python -m campaign.table"
