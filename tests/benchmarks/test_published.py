"""The paper's method as published equals the formulas as printed, head by head."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.baselines import Calibration, affine_of, decoder_weights, linear, weight_of, widths_for
from benchmarks.published import published
from tests.conftest import VOCABULARY, build_model
from tests.helpers.literal import square_root, truncate

TARGET = 0.4


@pytest.fixture(scope="module", params=["llama-gqa-tied", "llama-mha", "qwen2-gqa"])
def calibration(request) -> Calibration:
    tokens = torch.randint(VOCABULARY, (10, 32), generator=torch.Generator().manual_seed(1))
    return Calibration(build_model(request.param), tokens, batch_size=4)


@torch.no_grad()
def seen(model, tokens, *wanted):
    """Return the inputs of linear layers `(layer, role)`, float64 `[tokens, in]`, in one forward."""
    found = {}
    hooks = [
        linear(model.model.layers[index], role).register_forward_pre_hook(
            lambda module, args, key=(index, role): found.update({key: args[0].double().flatten(0, 1)})
        )
        for index, role in wanted
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def kept_pairs(calibration, index, kv_head):
    """Return the literal choice of pairs of one KV head, from queries and keys of all calibration tokens."""
    model, shape = calibration.model, calibration.shape
    x = seen(model, calibration.tokens, (index, "q"))[index, "q"]
    h, layer = shape.head_dim, model.model.layers[index]
    x = with_one(x)
    queries = (x @ affine_of(layer, "q").T).view(len(x), -1, h)[:, kv_head * shape.group : (kv_head + 1) * shape.group]
    keys = (x @ affine_of(layer, "k").T).view(len(x), -1, h)[:, kv_head]
    scores = [
        sum(queries[..., dim].square().mean(0).sum() * keys[:, dim].square().mean() for dim in (pair, pair + h // 2))
        for pair in range(h // 2)
    ]
    return sorted(sorted(range(h // 2), key=lambda pair: -scores[pair])[: widths(calibration).pairs])


def with_one(x):
    """Append the constant that a bias is multiplied with."""
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def widths(calibration):
    return widths_for(calibration.shape, TARGET, attention=True)


@torch.no_grad()
def test_attention_scores_are_the_sums_over_each_heads_kept_pairs(calibration):
    """The masked model's attention, computed by transformers, has the softmax of RoPE'd products of kept pairs only."""
    shape, result = calibration.shape, published(calibration, TARGET)
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(2))
    result.model.set_attn_implementation("eager")
    attention = result.model(tokens, output_attentions=True, use_cache=False).attentions[0].double()
    source, h = calibration.model, shape.head_dim
    x = source.model.layers[0].input_layernorm(source.model.embed_tokens(tokens))
    cos, sin = source.model.rotary_emb(x, torch.arange(24)[None])
    q, k = (linear(source.model.layers[0], role)(x).view(2, 24, -1, h).transpose(1, 2) for role in ("q", "k"))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    chosen = set()
    for head in range(shape.heads):
        pairs = kept_pairs(calibration, 0, head // shape.group)
        chosen.add(tuple(pairs))
        dims = [dim for pair in pairs for dim in (pair, pair + h // 2)]
        scores = (q[:, head][..., dims] @ k[:, head // shape.group][..., dims].mT).double() / h**0.5
        scores.masked_fill_(torch.ones(24, 24, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(attention[:, head], scores.softmax(-1), rtol=1e-4, atol=1e-5)
    assert len(chosen) > 1, "each KV head has pairs of its own"


def test_values_and_outputs_are_the_printed_theorem(calibration):
    """`R^½ W_v [W_o …]` is truncated by SVD; under MHA, `R` is that of the attention-weighted inputs."""
    shape, result = calibration.shape, published(calibration, TARGET)
    h, g = shape.head_dim, shape.group
    for index, layer in enumerate(calibration.model.model.layers):
        inputs = seen(calibration.model, calibration.tokens, (index, "q"), (index, "o"))
        for kv_head in range(shape.kv_heads):
            rows = slice(kv_head * h, (kv_head + 1) * h)
            columns = slice(kv_head * g * h, (kv_head + 1) * g * h)

            def maps(one, rows=rows, columns=columns):
                side_by_side = torch.cat(list(weight_of(one, "o")[:, columns].T.split(h)), 1)
                return affine_of(one, "v")[rows].T, side_by_side

            (w_v, w_o), (new_v, new_o) = maps(layer), maps(result.model.model.layers[index])
            if g > 1:
                x = with_one(inputs[index, "q"])
                root = square_root(x.T @ x / len(x))
                before, after = root @ w_v @ w_o, root @ new_v @ new_o
            else:  # o_i = (p x) W_v: the weighted inputs are seen through W_v alone
                o = inputs[index, "o"][:, columns]
                root = square_root(o.T @ o / len(o))
                before, after = root @ w_o, root @ torch.linalg.lstsq(w_v, new_v).solution @ new_o
            torch.testing.assert_close(after, truncate(before, widths(calibration).values), rtol=1e-3, atol=1e-4)


def test_channels_are_kept_by_the_printed_score(calibration):
    result = published(calibration, TARGET)
    for index, layer in enumerate(calibration.model.model.layers):
        x = seen(calibration.model, calibration.tokens, (index, "down"))[index, "down"]
        root, down = square_root(x.T @ x / len(x)), weight_of(layer, "down")
        scores = root.square().sum(0) * down.square().sum(0)
        kept = scores >= scores.sort(descending=True).values[widths(calibration).channels - 1]
        new = result.model.model.layers[index]
        assert torch.equal(weight_of(new, "down"), down * kept)
        for role in ("gate", "up"):
            assert torch.equal(weight_of(new, role), weight_of(layer, role) * kept[:, None])


def test_what_is_counted_is_what_is_not_zero(calibration):
    before = copy.deepcopy(calibration.model.state_dict())
    result = published(calibration, TARGET)
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    nonzero = sum(int((weight_of(layer, role) != 0).sum()) for layer in result.model.model.layers for role in roles)
    assert nonzero == result.stored
    assert result.dense == decoder_weights(calibration.shape)
    assert result.removed >= TARGET
    after = calibration.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
