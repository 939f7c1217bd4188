"""Late interaction: the mean best cosine of tokens, by hand."""

from __future__ import annotations

import torch

from d2llm.ops.scoring import mean_best_cosines

QUERIES = [torch.tensor([[2**0.5, 0], [0, 2**0.5]]), torch.tensor([[-(2**0.5), 0]]), torch.zeros(0, 2)]
PASSAGES = [torch.tensor([[2**0.5, 0]]), torch.tensor([[0, 2**0.5], [1.0, 1.0]]), torch.zeros(0, 2)]
HALF = 2**-0.5


def test_each_token_of_the_query_finds_the_most_similar_one():
    expected = [[0.5, (HALF + 1) / 2, -1.0], [-1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(mean_best_cosines(QUERIES, PASSAGES), torch.tensor(expected))


def test_tokens_without_a_vector_count_as_cosines_of_0():
    expected = [[0.25, (HALF + 1) / 4, -0.5], [-1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(mean_best_cosines(QUERIES, PASSAGES, num_tokens=[4, 1, 7]), torch.tensor(expected))


def test_only_the_most_similar_token_has_a_gradient():
    passage = torch.tensor([[0, 2**0.5], [1.0, 1.0]], requires_grad=True)
    mean_best_cosines(QUERIES[:1], [passage]).sum().backward()
    # of the query's two tokens, the first is nearest to the second of the passage, the second to the first
    torch.testing.assert_close(passage.grad, torch.stack([QUERIES[0][1], QUERIES[0][0]]) / 4)
