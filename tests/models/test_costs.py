"""Counted costs match formulas written out here."""

from dataclasses import replace

import pytest

from a3cli.models.costs import prefill_flops_per_token
from a3cli.models.families import ModelShape

MHA = ModelShape(hidden_size=96, layers=3, heads=6, kv_heads=6, head_dim=32, intermediate_size=160)


def paper_flops_per_token(shape: ModelShape, length: int) -> int:
    """Return the paper's `8BLHD + 4BL²AD + BL²A + 6BLIH` over all layers, for one of the B·L tokens."""
    width, heads, head = shape.hidden_size, shape.heads, shape.head_dim
    of_layer = 8 * width * heads * head + 4 * length * heads * head + length * heads
    return shape.layers * (of_layer + 6 * shape.intermediate_size * width)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_prefill_flops_are_the_papers_without_softmax_and_with_k_and_v_as_they_are(kv_heads):
    shape, length = replace(MHA, kv_heads=kv_heads), 50
    softmax = length * shape.heads
    unused_kv = 4 * shape.hidden_size * shape.head_dim * (shape.heads - kv_heads)
    counted = prefill_flops_per_token(shape, shape.sizes, length)
    assert paper_flops_per_token(shape, length) - counted == shape.layers * (softmax + unused_kv)
