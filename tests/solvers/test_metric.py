"""The metric of errors in the stream: moments of gradients, pulled towards the identity where tokens are few."""

import pytest
import torch

from a3cli.solvers.metric import metric_root


@pytest.mark.parametrize("tokens", [3, 12, 400])
def test_root_is_that_of_the_literal_metric(tokens):
    gradients = torch.randn(tokens, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = gradients.mT @ gradients / tokens
    prior = 12 / (12 + tokens)
    root = metric_root(moments, tokens)
    expected = (1 - prior) * moments / moments.diagonal().mean() + prior * torch.eye(12)
    torch.testing.assert_close(root.mT @ root, expected)
    assert (root.mT @ root).diagonal().mean().item() == pytest.approx(1)


def test_without_gradients_all_directions_count_alike():
    torch.testing.assert_close(metric_root(torch.zeros(4, 4), 10), torch.eye(4, dtype=torch.float64))
