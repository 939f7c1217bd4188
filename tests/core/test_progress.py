"""Progress without a terminal: occasional lines in the log."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

from rich.progress import TimeRemainingColumn

from d2llm.core import progress
from d2llm.core.progress import progress_bar, showing_progress
from d2llm.core.time_limit import time_limit


def logged_lines(caplog, monkeypatch, seconds, total=200, done=0):
    """The log lines of a task whose parts of 50 items end at these seconds."""
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # not that of other threads
    with caplog.at_level(logging.INFO, "d2llm.remarks"), progress_bar("judging", total, done=done) as advance:
        for _ in seconds:
            advance(50, "3.1 pairs/s")
    return [record.getMessage() for record in caplog.records]


def test_a_line_is_logged_every_half_minute(caplog, monkeypatch):
    assert logged_lines(caplog, monkeypatch, [10.0, 40.0, 50.0, 300.0]) == [
        "judging: 100 of 200 (50%) after 40 s, 40 s left, 3.1 pairs/s",
        "judging: 200 of 200 (100%) after 5 min, 0 s left, 3.1 pairs/s",
    ]


def test_the_time_left_does_not_count_what_an_earlier_run_finished(caplog, monkeypatch):
    assert logged_lines(caplog, monkeypatch, [40.0, 80.0], total=250, done=100) == [
        "judging: 150 of 250 (60%) after 40 s, 80 s left, 3.1 pairs/s",
        "judging: 200 of 250 (80%) after 80 s, 40 s left, 3.1 pairs/s",
    ]


def test_short_tasks_log_nothing(caplog, monkeypatch):
    assert logged_lines(caplog, monkeypatch, [5.0, 10.0, 20.0, 29.0]) == []


def test_progress_without_a_known_total(caplog, monkeypatch):
    assert logged_lines(caplog, monkeypatch, [31.0], total=None) == ["judging: 50, 3.1 pairs/s"]


def test_show_false_disables_bars_and_lines(caplog, monkeypatch, capsys):
    with showing_progress(False):
        assert logged_lines(caplog, monkeypatch, [100.0, 200.0]) == []
        with showing_progress(None):  # as outside
            assert logged_lines(caplog, monkeypatch, [100.0, 200.0]) == []
    assert capsys.readouterr().err == ""


def test_a_nested_task_has_its_own_bar_while_it_runs(capsys, monkeypatch):
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    with showing_progress(True), progress_bar("distilling", 20) as advance:
        display = progress._display.get()
        advance(3)
        with progress_bar("measuring on dev", 500) as inner:
            inner(200, "banking77")
            assert [(bar.description, bar.completed, bar.total) for bar in display.tasks] == [
                ("distilling", 3, 20),
                ("measuring on dev", 200, 500),
            ]
        assert [bar.description for bar in display.tasks] == ["distilling"]
    assert progress._display.get() is None
    assert "distilling" in capsys.readouterr().err


def test_quick_work_shows_no_bar(capsys):
    with showing_progress(True), progress_bar("indexing", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_the_time_left_is_at_most_that_until_the_limit(caplog, monkeypatch, capsys):
    clock = iter([0.0, 40.0])
    with time_limit(100.0):
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        with caplog.at_level(logging.INFO, "d2llm.remarks"), progress_bar("distilling", 10_000) as advance:
            advance(1)  # of the rest, 4.6 days would be left
    assert re.fullmatch(r"distilling: 1 of 10,000 \(0%\) after 40 s, (59|60) s left", caplog.messages[0])
    caplog.clear()
    clock = iter([0.0, 40.0])
    with caplog.at_level(logging.INFO, "d2llm.remarks"), progress_bar("writing", 10_000, seconds=360.0) as advance:
        advance(1)  # the work ends by itself
    assert caplog.messages == ["writing: 1 of 10,000 (0%) after 40 s, 5 min left"]


def test_a_bar_shows_the_time_until_the_limit(capsys, monkeypatch):
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    with showing_progress(True), progress_bar("distilling", 1_000_000, seconds=3_599.9) as advance:
        display = progress._display.get()
        advance(1)
        [column] = [each for each in display.columns if isinstance(each, TimeRemainingColumn)]
        [task] = display.tasks
        assert column.render(task).plain == "0:59:59"
    with showing_progress(True), progress_bar("distilling", 2) as advance:
        display = progress._display.get()
        advance(2)
        [task] = display.tasks
        [column] = [each for each in display.columns if isinstance(each, TimeRemainingColumn)]
        assert column.render(task).plain == "0:00:00"
    capsys.readouterr()
