from __future__ import annotations

import signal
import threading

import pytest

from d2llm.core.stop_signals import StopSignals


def test_an_error_in_a_held_block_leaves_it_inconsistent():
    with pytest.raises(ZeroDivisionError), StopSignals() as signals, signals.held():
        _ = 1 / 0
    assert not signals.is_consistent


def test_handlers_of_other_code_are_left_alone():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]


def test_other_threads_install_no_handlers():
    handlers = []

    def work():
        with StopSignals() as signals, signals.held():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
