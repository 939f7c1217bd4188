"""Damages the files of a small index, one at a time, and checks that a search or ``verify`` notices.

    python tests/index_damage.py --cases 2500 --seed 1 --repair     prints a table; exits with 1 if damage is silent

Each case copies an index with hard links, damages one file, then opens, searches and verifies the copy. This runs in
separate processes, since a damaged file may crash the process that reads it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from d2llm.core.errors import D2LLMError
from d2llm.core.types import Passage
from d2llm.ops.rereading import StudentError
from d2llm.retrieval.calibrate import read_error, write_error
from d2llm.store.ann import AnnIndex, AnnRecord, AnnSearch, write_ann
from d2llm.store.index_manifest import VectorCopies
from d2llm.store.index_store import IndexStore
from d2llm.store.inspection import verify
from d2llm.store.shards import Storage
from d2llm.store.view import PassageView
from tiny_store import DIM, few_passages, live_rows, new_store, parts_of, put, vectors_of

TESTS = Path(__file__).parent
DAMAGES = ("flipped bit", "cut", "swapped blocks", "zeroed block", "removed", "of another")
WORDS = ("common", "title own5 own41 changed", "中文 later")
FILTERS = ("year >= 2010 OR language = 'de'", "id = 'p7' OR document_id = 'd2' AND position > 1")
_DERIVED = ("ann-",)
_ANN = "approximate"  # if it is unusable, the exact scan is used instead
QUERIES = np.random.default_rng(3).standard_normal((2, DIM)).astype(np.float32)


class Case(NamedTuple):
    """A file of the index ``base``, how it is damaged, the seed of the damage, and whether the index is repaired."""

    base: str
    path: str
    how: str
    seed: int
    repair: bool = False


class StoredTeacher:
    """The teacher whose student error is stored in the index."""

    fingerprint = "teacher"

    def prompt_fingerprint(self, task: str) -> str:
        return task


# The index ------------------------------------------------------------------------------------------------------------


def make_index(folder: Path, vector_copies: VectorCopies = 2) -> None:
    """An index with words, windows, tokens, deletions, several versions and all derived files."""
    store = new_store(folder, vector_copies=vector_copies, window_format="int8", token_format="int4")
    passages = [
        Passage(
            p.id,
            f"{p.text} 中文",
            p.title,
            document_id=f"d{n % 5}",
            position=n % 3,
            metadata={"year": 2000 + n, "language": ("de", "en")[n % 2]},
        )
        for n, p in enumerate(few_passages(60).values())
    ]
    put(store, passages)
    store.update_word_files()
    store.delete(["p1", "p3", "p20"])
    put(store, few_passages(5, start=10, word="changed").values())
    put(store, few_passages(8, start=60, word="later").values())
    view = PassageView(store)
    base, vectors = view.ann_base, view.vector_file
    assert base is not None
    assert vectors is not None
    rows = live_rows(view)
    index = faiss.index_factory(DIM, "HNSW16,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(view.vectors(rows))
    index.add(view.block(0, view.capacity))
    record = AnnRecord(
        "student",
        "bfloat16",
        view.version,
        vectors.since,
        view.capacity,
        len(rows),
        [[1, 20], [20, 40]],
        0.9,
        "given",
        3,
        [{"depth": 5, "effort": 20, "recall": 1.0, "at_least": 0.9}],
    )
    with store.writing():
        write_ann(AnnIndex(base, index, record))
    write_error(Storage.open(folder), StoredTeacher(), "asymmetric", StudentError(1.5, 0.25, 0.125, 0.5, 400))  # pyright: ignore[reportArgumentType]


def make_bases(folder: Path) -> dict[str, Path]:
    """Indexes with two copies of the vectors, with one copy, with a snapshot, and compacted (all files in use)."""
    bases = {name: folder / name for name in ("two copies", "one copy", "snapshot", "compacted")}
    make_index(bases["two copies"])
    make_index(bases["one copy"], vector_copies=1)
    shutil.copytree(bases["two copies"], bases["snapshot"])
    IndexStore.open(bases["snapshot"]).snapshot("a")
    shutil.copytree(bases["two copies"], bases["compacted"])
    store = IndexStore.open(bases["compacted"])
    store.compact(timedelta(0))
    return bases


def files_of(folder: Path) -> list[str]:
    """The files of an index, or of its snapshots if it has any."""
    inside = "snapshots" if (folder / "snapshots").exists() else "."
    paths = (path for path in (folder / inside).rglob("*") if path.is_file() and path.name != "write.lock")
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def kind_of(path: str) -> str:
    """The kind of a file: its name or folder, without the part that varies between files of the same kind."""
    parts = Path(path).parts
    return f"words{Path(path).suffix}" if parts[-1].startswith("words-") else parts[-1]


def cases(bases: dict[str, Path], number: int, seed: int, *, repair: bool = False) -> Iterator[Case]:
    """Yield ``number`` cases that cycle through all kinds of files of every index and all kinds of damage.

    The table comes sixteen times as often as the rest, and word files four times. Files derived from vectors are the
    same in every index, so those of one index are enough.
    """
    chance = random.Random(seed)
    kinds: dict[tuple[str, str], list[Case]] = {}
    for base, folder in bases.items():
        for path in files_of(folder):
            if base != "two copies" and kind_of(path).startswith(_DERIVED):
                continue
            kinds.setdefault((base, kind_of(path)), []).append(Case(base, path, "", 0))
    times = {"passages.db": 16, "words.bin": 4, "words.json": 4}
    turns = [(kind, how) for how in DAMAGES for kind in kinds for _ in range(times.get(kind[1], 1))]
    turns = [turn for turn in turns if turn[1] != "of another" or len(kinds[turn[0]]) > 1]  # another of its kind
    for index in range(number):
        if index % len(turns) == 0:
            chance.shuffle(turns)
            first = {kind: (kind, how) for kind, how in reversed(turns)}  # every kind of file before any comes again
            turns = [*first.values(), *(turn for turn in turns if first[turn[0]] != turn)]
        kind, how = turns[index % len(turns)]
        yield chance.choice(kinds[kind])._replace(how=how, seed=seed * 1_000_000 + index, repair=repair)


# Damage ---------------------------------------------------------------------------------------------------------------


def copy_linked(source: Path, target: Path) -> None:
    """Copy a folder with hard links; a file must be unlinked before it is changed."""
    for path in source.rglob("*"):
        if path.is_file():
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.hardlink_to(path)


def damage(folder: Path, case: Case) -> bool:
    """Damage a file; False if it is too short, or if all other files of its kind have the same content."""
    chance, path = random.Random(case.seed), folder / case.path
    content = path.read_bytes()
    changed = bytearray(content)
    if case.how == "removed":
        path.unlink()
        return True
    if case.how == "of another":
        same = [other for other in files_of(folder) if kind_of(other) == kind_of(case.path) and other != case.path]
        others = [data for data in ((folder / other).read_bytes() for other in same) if data != content]
        if not others:
            return False
        changed = bytearray(chance.choice(others))
    elif not content:
        return False
    elif case.how == "flipped bit":
        index = chance.randrange(len(content))
        changed[index] ^= 1 << chance.randrange(8)
    elif case.how == "cut":
        del changed[chance.randrange(len(content)) :]
    else:
        length = chance.randint(1, max(1, min(64, len(content) // 3)))
        first = chance.randrange(max(1, len(content) - 2 * length + 1))
        second = chance.randrange(first, max(first + 1, len(content) - length + 1))
        one, other = content[first : first + length], content[second : second + length]
        changed[first : first + length] = bytes(length) if case.how == "zeroed block" else other
        if case.how == "swapped blocks":
            changed[second : second + len(other)] = one[: len(other)]
    if bytes(changed) == content:
        return False
    path.unlink()
    path.write_bytes(changed)
    return True


# Effects of the damage -----------------------------------------------------------------------------------------------


def answers(folder: Path) -> dict[str, Any]:
    """The results of every kind of search."""
    view = PassageView(IndexStore.open(folder))
    rows = live_rows(view)
    passages = view.passages(rows)
    results: dict[str, Any] = {
        "version": view.version,
        "task": view.task,
        "passages": sorted([p.id, p.title, p.text, p.document_id, p.position, p.metadata] for p in passages),
        "vectors": sorted([p.id, v.tolist()] for p, v in zip(passages, view.vectors(rows), strict=True)),
    }
    for query in QUERIES:
        best = view.scan(query, 5)
        ids = [view.ids(best.rows), best.scores.tolist()]
        results[f"scan {len(results)}"] = ids
        results[f"windows {len(results)}"] = sorted(
            [p.id, score] for p, score in zip(passages, view.best_windows(query, rows).tolist(), strict=True)
        )
        results[f"tokens {len(results)}"] = sorted(
            [p.id, score] for p, score in zip(passages, view.best_tokens(query[None], rows).tolist(), strict=True)
        )
        near = None if view.ann is None else AnnSearch(view.ann, view.mask(None), view.ids).search(query, 5)
        results[f"{_ANN} {len(results)}"] = None if near is None else [view.ids(near[0]), near[1].tolist()]
    for word in WORDS:
        best = view.match(word, 99)
        results[f"match {word}"] = [view.ids(best.rows), best.scores.tolist()]
    results["match filtered"] = sorted(view.ids(view.match("common", 99, FILTERS[0]).rows))
    for condition in FILTERS:
        mask = view.select(condition)
        assert mask is not None
        results[f"filter {condition}"] = sorted(view.ids(np.flatnonzero(mask)))
    results["get"] = [passage.text for passage in view.get(["p7", "p1", "p12", "p63", "p59"])]
    results["rows"] = view.ids(view.rows(["p7", "p12", "p63"]))
    results["parts"] = sorted(view.store.table(view.version).positions_of(["d2", "p7"]))
    results["neighbours"] = [passage.id for passage in view.neighbours(view.get(["p6", "p30"]), 1)]
    error = read_error(folder, StoredTeacher(), "asymmetric")  # pyright: ignore[reportArgumentType]
    assert error == StudentError(1.5, 0.25, 0.125, 0.5, 400), "another error of the student"
    return json.loads(json.dumps(results, default=str))


def searched(folder: Path, expected: dict[str, Any], *, repaired: bool = False) -> tuple[str, str]:
    """Whether searches give the same results, wrong ones, or report damage.

    A repair changes the version.
    """
    try:
        results = answers(folder)
    except D2LLMError as error:
        return "refused", str(error)
    except AssertionError as error:
        return "wrong", str(error)
    except BaseException:  # noqa: BLE001
        return "traceback", traceback.format_exc()
    results = {
        name: expected[name] if name.startswith(_ANN) and not value else value for name, value in results.items()
    }
    if repaired:
        results["version"] = expected["version"]
    differing = [name for name in expected if results[name] != expected[name]]
    return ("wrong", ", ".join(differing)) if differing else ("same", "")


def verified(folder: Path, *, repair: bool = False) -> tuple[str, str]:
    """Whether ``verify`` finds problems."""
    try:
        store = IndexStore.open(folder)
        problems = verify(store, repair=repair, drop_lost=repair, encode=vectors_of, encode_parts=parts_of).problems
    except D2LLMError as error:
        return "refused", str(error)
    except BaseException:  # noqa: BLE001
        return "traceback", traceback.format_exc()
    text = "\n".join(problems)
    is_lost = re.search(r"passages? (is|are) lost: |later changes? (is|are) lost", text) is not None
    return ("lost" if is_lost else "problems" if text else "good"), text


def look_at(folder: Path, expected: dict[str, Any], *, repair: bool) -> dict[str, tuple[str, str]]:
    """The outcomes of a search and of ``verify``, and with ``repair`` also after a repair."""
    outcomes = {"search": searched(folder, expected), "verify": verified(folder)}
    if repair:
        outcomes["repair"] = verified(folder, repair=True)
        outcomes["verify again"] = verified(folder)
        outcomes["search again"] = searched(folder, expected, repaired=True)
    return outcomes


# Processes ------------------------------------------------------------------------------------------------------------


def work() -> None:
    """For each input line (a case and the folder of its index), print a line with the outcomes."""
    logging.disable(logging.CRITICAL)
    expected: dict[str, dict[str, Any]] = {}
    for line in sys.stdin:
        base, case = Path(json.loads(line)["base"]), Case(*json.loads(line)["case"])
        part = str(Path(*Path(case.path).parts[:2])) if case.path.startswith("snapshots/") else "."
        if case.base not in expected:
            with tempfile.TemporaryDirectory(dir=base.parent) as folder:  # opening an index may leave a lock file
                copy_linked(base, Path(folder) / "copy")
                expected[case.base] = answers(Path(folder) / "copy" / part)
        with tempfile.TemporaryDirectory(dir=base.parent) as folder:
            copy = Path(folder) / "copy"
            copy_linked(base, copy)
            outcomes = look_at(copy / part, expected[case.base], repair=case.repair) if damage(copy, case) else {}
        print(json.dumps(outcomes), flush=True)


def run(bases: dict[str, Path], chosen: list[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yield the outcomes of each case; if a signal killed the process, the outcome is "signal"."""
    remaining = list(chosen)
    while remaining:
        command = [sys.executable, str(TESTS / "index_damage.py"), "--work"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])}
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            while remaining:
                with suppress(BrokenPipeError):
                    process.stdin.write(
                        json.dumps({"base": str(bases[remaining[0].base]), "case": remaining[0]}) + "\n"
                    )
                    process.stdin.flush()
                line = process.stdout.readline()
                case = remaining.pop(0)
                if not line:
                    yield case, {"search": ("signal", f"exit status {process.wait()}"), "verify": ("signal", "")}
                    break
                yield case, json.loads(line)
            with suppress(BrokenPipeError):
                process.stdin.close()


def faults(seen: dict[str, Any]) -> list[str]:
    """Failures: damage that ``verify`` misses although results are wrong or refused, tracebacks and signals."""
    failures = [f"{name}: {outcome}" for name, (outcome, _) in seen.items() if outcome in ("traceback", "signal")]
    if seen and seen["verify"][0] == "good" and seen["search"][0] != "same":
        failures.append(f"silent: search says {seen['search'][0]}, verify good")
    if "repair" in seen and seen["repair"][0] != "lost":
        outcome_after = seen["search again"][0]
        if seen["verify again"][0] == "good" and outcome_after != "same":
            failures.append(f"after a repair, search says {outcome_after}, verify good")
    return failures


def main() -> None:
    """Run the cases, or a worker process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", action="store_true")
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repair", action="store_true")
    parser.add_argument("--show", action="store_true", help="print every case")
    options = parser.parse_args()
    if options.work:
        work()
        return
    folder = Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        bases = make_bases(folder)
        sys.exit(_report(bases, options))
    finally:
        shutil.rmtree(folder)


def _report(bases: dict[str, Path], options: argparse.Namespace) -> int:
    table: Counter[tuple[str, ...]] = Counter()
    num_failed = 0
    chosen = list(cases(bases, options.cases, options.seed, repair=options.repair))
    for case, outcomes in run(bases, chosen):
        outcome = tuple(f"{name}: {status}" for name, (status, _) in outcomes.items()) or ("nothing to damage",)
        table[outcome] += 1
        failures = faults(outcomes)
        num_failed += bool(failures)
        if failures or options.show or outcomes.get("search", [""])[0] == "wrong":
            print(*case, *outcome, *failures, json.dumps(outcomes), sep=" | ")
    for outcome, number in table.most_common():
        print(f"{number:6,}  {'; '.join(outcome)}")
    print(f"{num_failed} of {options.cases} cases must not be")
    return int(num_failed > 0)


if __name__ == "__main__":
    main()
