"""Smaller heads behind a norm: the loss is literal, no optimiser beats it, and heads that fit are found."""

import math
from dataclasses import replace

import pytest
import torch

from a3cli.solvers.normed import NormedAttention, NormedHeads, with_norms, without_norms
from a3cli.solvers.partial import complex_columns, real_columns
from tests.solvers.test_attention import BLOCKS, GROUP, LENGTH, PAIRS, SLOTS, WINDOW, H, rotated, sampled

KV_HEADS, RANK = 2, 4
# All dims that belong to the slots 1 and 3.
KEPT = [1, 3, 5, 7]


def norms():
    generator = torch.Generator().manual_seed(3)
    return [0.5 + torch.rand(H, generator=generator) for _ in range(2)]


def behind_norm(heads, weight):
    return heads / heads.square().mean(-1, keepdim=True).sqrt() * weight


def layer(*, window=LENGTH, only=None):
    """Return the samples of a layer with norms on its heads, and its output weights; `only` these dims are not 0."""
    heads, outputs = zip(*(sampled(window=window, seed=seed) for seed in range(KV_HEADS)), strict=True)
    keep = torch.ones(H) if only is None else torch.zeros(H).index_fill(0, torch.tensor(only), 1)
    q, k = norms()
    normed = [
        replace(head, queries=behind_norm(head.queries * keep, q), keys=behind_norm(head.keys * keep, k))
        for head in heads
    ]
    return normed, outputs


def start(seed=1):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, KV_HEADS, H, RANK, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(2, RANK, generator=generator, dtype=torch.float64)
    return NormedHeads(*maps, *weights)


def literal_loss(heads, outputs, found, slots=SLOTS):
    """Return the difference of the small heads' and the full heads' attention, one query and head at a time."""
    loss = 0.0
    for kv_head, (head, output) in enumerate(zip(heads, outputs, strict=True)):
        for block in range(BLOCKS):
            for row in range(head.queries.shape[1]):
                first, place = (int(x) for x in head.seen[block, row])
                values, keys = (x[block, first : place + 1].double() for x in (head.values, head.keys))
                small_keys = behind_norm(keys @ found.key[kv_head], found.key_norm)
                for i in range(GROUP):
                    q = head.queries[block, row, i].double()
                    small = behind_norm(q @ found.query[kv_head], found.query_norm)
                    after = []
                    for query, each, turns in ((q, keys, PAIRS), (small, small_keys, slots)):
                        turned = torch.stack([rotated(key, first + n, turns) for n, key in enumerate(each)])
                        weights = (turned @ rotated(query, place, turns) / math.sqrt(H)).softmax(0)
                        after.append(weights @ values @ output[i].double())
                    loss += (after[0] - after[1]).square().sum().item()
    return loss / (BLOCKS * heads[0].queries.shape[1])


@pytest.mark.parametrize("window", [LENGTH, WINDOW])
def test_loss_is_the_literal_one(window):
    heads, outputs = layer(window=window)
    found = NormedAttention(heads).loss(start(), SLOTS)
    assert found == pytest.approx(literal_loss(heads, outputs, start()), rel=1e-4)


def test_whole_heads_lose_nothing():
    """The source's own heads: the map undoes the norm's weights, which the smaller norm has again."""
    heads, _ = layer()
    q, k = (each.double() for each in norms())
    whole = NormedHeads(*(torch.diag(1 / each).expand(KV_HEADS, -1, -1) for each in (q, k)), q, k)
    assert NormedAttention(heads).loss(whole, PAIRS) < 1e-9
    assert NormedAttention(heads).loss(start(), SLOTS) > 1


def test_the_length_of_a_map_has_no_effect():
    problem, found = NormedAttention(layer()[0]), start()
    longer = replace(found, query=found.query * torch.tensor([3.0, 0.1])[:, None, None], key=found.key / 7)
    assert problem.loss(longer, SLOTS) == pytest.approx(problem.loss(found, SLOTS), rel=1e-4)
    assert problem.loss(replace(found, key_norm=found.key_norm * 2), SLOTS) != pytest.approx(
        problem.loss(found, SLOTS), rel=1e-2
    )


def grams(heads):
    """Return the Gram matrices of queries `[H, h, h]` and keys `[K, h, h]`."""
    queries = [head.queries[:, :, i].flatten(0, 1) for head in heads for i in range(GROUP)]
    keys = [head.keys.flatten(0, 1) for head in heads]
    return [torch.stack([x.double().T @ x.double() / len(x) for x in each]) for each in (queries, keys)]


def test_norms_restore_mean_squares_and_scores():
    """Maps get equal norms whose heads have the mean square and the scores that the maps have without them."""
    heads, _ = layer()
    maps, own = torch.randn(2, KV_HEADS, H, RANK, dtype=torch.float64), grams(heads)
    found = with_norms(*maps, *own)
    for k in range(KV_HEADS):
        product = (found.query[k] * found.query_norm) @ (found.key[k] * found.key_norm).T
        torch.testing.assert_close(product, maps[0, k] @ maps[1, k].T)
    squares = [
        torch.einsum("khr,khi,kir->kr", each, gram.unflatten(0, (KV_HEADS, -1)).mean(1), each).mean(0)
        for each, gram in zip((found.query, found.key), own, strict=True)
    ]
    for each, norm in zip(squares, (found.query_norm, found.key_norm), strict=True):
        assert each.mean().item() == pytest.approx(1)
        assert (norm == norm[0]).all()


def test_maps_at_the_mean_length_are_the_heads_themselves_if_lengths_do_not_vary():
    heads, _ = layer(only=KEPT)
    square = torch.eye(H, dtype=torch.float64)[:, KEPT]
    q, k = (each.double() for each in norms())
    found = NormedHeads(*((square / each[:, None]).expand(KV_HEADS, -1, -1) for each in (q, k)), q[KEPT], k[KEPT])
    query, key = without_norms(found, *grams(heads))
    for head, linear in ((heads[0].queries, query), (heads[0].keys, key)):
        weight = found.query_norm if linear is query else found.key_norm
        small = behind_norm(head.double() @ (found.query if linear is query else found.key)[0], weight)
        torch.testing.assert_close(head.double() @ linear[0], small)


def test_heads_that_fit_are_found():
    """Queries and keys of only two pairs: a norm over their dims is the source's, up to a factor in its weights."""
    heads, _ = layer(only=KEPT)
    problem, slots = NormedAttention(heads), PAIRS[[1, 3]]
    chosen = torch.eye(H, dtype=torch.float64)[:, KEPT].expand(KV_HEADS, -1, -1)
    noise = start()
    near = with_norms(chosen + 0.2 * noise.query, chosen + 0.2 * noise.key, *grams(heads))
    found = problem.refine(near, slots, judge=problem, iterations=200)
    assert found.before == problem.loss(near, slots)
    assert found.after == problem.loss(found.heads, slots) < 1e-3 * found.before
    # The mean square of all dims is RANK / H of that of the kept ones, and scores are products of both norms' weights.
    products = found.heads.query_norm * found.heads.key_norm
    torch.testing.assert_close(
        products, norms()[0][KEPT] * norms()[1][KEPT] * H / RANK, rtol=0.1, atol=0, check_dtype=False
    )


@pytest.mark.parametrize("seed", range(3))
def test_other_samples_say_when_to_stop(seed):
    fitted, judge = NormedAttention(layer()[0]), NormedAttention([sampled(seed=10 + seed)[0] for _ in range(KV_HEADS)])
    found = fitted.refine(start(seed), SLOTS, judge=judge, iterations=20)
    assert found.before == judge.loss(start(seed), SLOTS)
    assert found.after == judge.loss(found.heads, SLOTS) <= found.before
    assert fitted.loss(found.heads, SLOTS) <= fitted.loss(start(seed), SLOTS)


def test_a_penalty_pulls():
    problem, wanted = NormedAttention(layer()[0]), start().key_norm + 1
    free, pulled = (
        problem.refine(start(), SLOTS, judge=problem, iterations=10, penalty=penalty).heads
        for penalty in (None, lambda found: 1e3 * (found.key_norm - wanted).square().sum())
    )
    assert (pulled.key_norm - wanted).norm() < 0.1 * (free.key_norm - wanted).norm()


@pytest.mark.slow
def test_no_optimiser_finds_better_heads():
    """Adam, from the same start and from our result, takes away at most two thousandths of the start's loss more."""
    problem = NormedAttention(layer()[0])
    found = problem.refine(start(), SLOTS, judge=problem, iterations=200)
    assert found.after < 0.05 * found.before
    for begin, rate in ((start(), 0.01), (found.heads, 0.001)):
        variables = [each.clone().requires_grad_() for each in begin.parts]
        optimizer = torch.optim.Adam(variables, lr=rate)
        turned = list(problem._turned(SLOTS))
        for _ in range(1000):
            optimizer.zero_grad()
            problem._descend(NormedHeads(*variables), turned, 1.0, None)
            optimizer.step()
        other = problem.loss(NormedHeads(*(each.detach() for each in variables)), SLOTS)
        assert found.after - other < 0.002 * found.before


def test_real_maps_as_complex_ones():
    maps = torch.randn(3, H, RANK, dtype=torch.float64)
    assert torch.equal(real_columns(complex_columns(maps)), maps)
