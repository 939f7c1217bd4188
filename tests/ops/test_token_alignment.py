"""Tokens of two tokenizers: which share characters, by hand, and the mean of the teacher's states, token by token."""

from __future__ import annotations

import numpy as np
import torch

from d2llm.ops.token_alignment import align_tokens, aligned_states


def test_characters_that_two_tokens_share_are_counted() -> None:
    text = "unable cats"
    one = [(0, 0), (0, 2), (2, 6), (7, 11), (0, 0)]  # [CLS] un able cats [SEP]
    other = [(0, 4), (4, 6), (6, 10), (10, 11)]  # unab le _cat s
    expected = [[1, 0, 2], [2, 0, 2], [2, 1, 2], [3, 2, 3], [3, 3, 1]]
    assert align_tokens(text, one, other).tolist() == expected
    turned = [[index, student, shared] for student, index, shared in expected]
    assert align_tokens(text, other, one).tolist() == sorted(turned)


def test_white_space_prefixes_and_special_tokens_share_nothing() -> None:
    text = "a \u3000\nb"
    # A prefix of 4 characters, a token that reaches from it into the text, white space alone, and the last word.
    spans = [(-9, -9), (-9, -5), (-5, 1), (1, 4), (4, 5)]
    assert align_tokens(text, spans, [(0, 2), (1, 4), (3, 5)]).tolist() == [[2, 0, 1], [4, 2, 1]]
    assert align_tokens(text, [], spans).shape == (0, 3)
    assert align_tokens("", [(0, 0)], [(-2, 0)]).shape == (0, 3)


def test_bytes_of_one_character_share_it_alike() -> None:
    assert align_tokens("\N{SLIGHTLY SMILING FACE}", [(0, 1)], [(0, 1)] * 4).tolist() == [[0, n, 1] for n in range(4)]


def test_aligned_states_are_means_by_characters() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(3, 4, 5))
    pairs = [[[1, 0, 2], [2, 0, 2], [2, 1, 6]], [], [[0, 3, 1]]]
    arrays = [np.array(each, np.int32).reshape(-1, 3) for each in pairs]
    states, mask = aligned_states(torch.tensor(teacher, dtype=torch.float32), arrays, 3)
    expected = np.zeros((3, 3, 5))
    expected[0, 1], expected[0, 2] = teacher[0, 0], teacher[0, 0] / 4 + 3 * teacher[0, 1] / 4
    expected[2, 0] = teacher[2, 3]
    np.testing.assert_allclose(states.numpy(), expected, atol=1e-6)
    assert mask.tolist() == [[False, True, True], [False] * 3, [True, False, False]]
