"""Threads without work sleep soon, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NAMES = ("GOMP_SPINCOUNT", "OPENBLAS_THREAD_TIMEOUT")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ["3000", "10"]),
        ({"GOMP_SPINCOUNT": "7", "OPENBLAS_THREAD_TIMEOUT": "20"}, ["7", "20"]),
        ({"OMP_WAIT_POLICY": "passive"}, ["None", "10"]),
    ],
)
def test_importing_the_package_sets_what_the_user_has_not_set(own: dict[str, str], expected: list[str]) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in (*NAMES, "OMP_WAIT_POLICY")}
    code = (
        f"import d2llm, os, sys; print(*map(os.environ.get, {NAMES}), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=kept | own, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [*expected, "False", "False"]  # they are read when these are loaded
