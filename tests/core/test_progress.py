"""Progress where there is no terminal: lines in a log, not too many."""

from __future__ import annotations

import logging

from d2llm.core import progress
from d2llm.core.progress import progress_bar


def lines(caplog, monkeypatch, seconds, total=200, **settings):
    """What is logged of a work whose four parts of 50 end at these seconds."""
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "d2llm.remarks"), progress_bar("judging", total, **settings) as advance:
        for _ in seconds:
            advance(50, "3.1 pairs/s")
    return [record.getMessage() for record in caplog.records]


def test_a_line_twice_a_minute(caplog, monkeypatch):
    assert lines(caplog, monkeypatch, [10.0, 40.0, 50.0, 300.0]) == [
        "judging: 100 of 200 (50%) after 40 s, 40 s left, 3.1 pairs/s",
        "judging: 200 of 200 (100%) after 5 min, 0 s left, 3.1 pairs/s",
    ]


def test_work_that_is_soon_done_says_nothing(caplog, monkeypatch):
    assert lines(caplog, monkeypatch, [5.0, 10.0, 20.0, 29.0]) == []


def test_where_nobody_knows_how_much_there_is(caplog, monkeypatch):
    assert lines(caplog, monkeypatch, [31.0], total=None) == ["judging: 50, 3.1 pairs/s"]


def test_false_means_neither_bar_nor_lines(caplog, monkeypatch, capsys):
    assert lines(caplog, monkeypatch, [100.0, 200.0], show=False) == []
    assert capsys.readouterr().err == ""


def test_work_that_is_part_of_other_work_has_its_bar_below_while_it_lasts(capsys):
    with progress_bar("distilling", 20, show=True) as advance:
        display = progress._shown.get()
        advance(3)
        with progress_bar("measuring on dev", 500, show=True) as inner:
            inner(200, "banking77")
            assert [(bar.description, bar.completed, bar.total) for bar in display.tasks] == [
                ("distilling", 3, 20),
                ("measuring on dev", 200, 500),
            ]
        assert [bar.description for bar in display.tasks] == ["distilling"]
    assert progress._shown.get() is None
    assert "distilling" in capsys.readouterr().err
