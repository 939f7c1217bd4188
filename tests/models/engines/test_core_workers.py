"""One batch per core: the same results in the same order, on threads that use one core each."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from d2llm import Student
from d2llm.models.engines.core_workers import map_on_cores
from tiny_models import TEXTS, randomise, tiny_student_config, write_tiny_model


@pytest.fixture(autouse=True)
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_with_one_core_each():
    thread_and_cores = {}

    def work(number):
        thread_and_cores[number] = (threading.get_ident(), torch.get_num_threads())
        return number**2

    assert list(map_on_cores(work, range(40))) == [number**2 for number in range(40)]
    assert {cores for _, cores in thread_and_cores.values()} == {1}
    assert threading.get_ident() not in {thread for thread, _ in thread_and_cores.values()}
    assert torch.get_num_threads() == 2
    cores_of_new_thread = []
    thread = threading.Thread(target=lambda: cores_of_new_thread.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert cores_of_new_thread == [2]


def test_a_single_batch_gets_all_cores_and_stays_in_its_thread():
    assert list(map_on_cores(lambda _: (threading.get_ident(), torch.get_num_threads()), [1])) == [
        (threading.get_ident(), 2)
    ]


def test_errors_are_raised():
    with pytest.raises(ZeroDivisionError):
        list(map_on_cores(lambda number: 1 / number, [1, 0, 2]))


def test_vectors_match_one_core_even_in_training_mode(tmp_path, monkeypatch):
    monkeypatch.setattr("d2llm.models.device._CPU_TOKENS", 48)  # several batches
    student = Student.create(tiny_student_config(write_tiny_model(tmp_path / "model", "bert")), dtype="float32")
    randomise(student.pooling)
    texts = [f"{text} {'and ' * (n % 7)}{n}" for n, text in enumerate(TEXTS * 6)]
    finished = []
    student.train()
    vectors = student.encode_passages(texts, advance=finished.append).vectors
    assert student.training
    assert sum(finished) == len(texts)
    assert len(finished) > 3
    student.eval()
    torch.set_num_threads(1)
    np.testing.assert_allclose(student.encode_passages(texts).vectors, vectors, atol=1e-5)
