"""Each baseline of benchmarks/baselines.py has the property that defines it."""

import copy

import pytest
import torch

from benchmarks import baselines
from benchmarks.baselines import BASELINES, INPUT_OF, Calibration, affine_of, decoder_weights, linear, weight_of
from tests.conftest import VOCABULARY, build_model

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
STRUCTURED = ("magnitude", "wanda_structured", "modegpt")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    tokens = torch.randint(VOCABULARY, (10, 32), generator=torch.Generator().manual_seed(1))
    return Calibration(build_model("llama-gqa-tied"), tokens, batch_size=4)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@torch.no_grad()
def inputs_of(model, role, layer, tokens):
    """Return the input of a linear layer, float64 `[tokens, in]`."""
    seen = []
    hook = linear(model.model.layers[layer], role).register_forward_pre_hook(lambda m, a: seen.append(a[0].double()))
    model(tokens, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("target", [0.1, 0.25, 0.4])
def test_at_least_the_asked_share_is_removed(name, target, calibration, tokens):
    before = copy.deepcopy(calibration.model.state_dict())
    result = BASELINES[name](calibration, target)
    assert target <= result.removed < target + 0.03
    assert result.dense == decoder_weights(calibration.shape)
    out = logits(result.model, tokens)
    assert out.isfinite().all()
    assert (out - logits(calibration.model, tokens)).abs().max() > 0.1
    after = calibration.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_to_remove_changes_nothing(name, calibration, tokens):
    result = BASELINES[name](calibration, 0)
    assert result.removed == 0
    torch.testing.assert_close(logits(result.model, tokens), logits(calibration.model, tokens), rtol=1e-4, atol=1e-4)


def test_input_moments(calibration):
    for layer, grams in enumerate(calibration.grams):
        for role in ROLES:
            x = inputs_of(calibration.model, role, layer, calibration.tokens)
            torch.testing.assert_close(grams[INPUT_OF[role]], x.T @ x / len(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["svd", "svd_llm"])
def test_factors_are_stored_twice(name, calibration):
    result = BASELINES[name](calibration, 0.3)
    stored = 0
    for layer in result.model.model.layers:
        for role in ROLES:
            weight = weight_of(layer, role)
            rank = int(torch.linalg.matrix_rank(weight, rtol=1e-5))
            assert rank < min(weight.shape)
            stored += rank * sum(weight.shape)
    assert stored == result.stored


def test_svd_error_is_the_tail(calibration):
    result = BASELINES["svd"](calibration, 0.3)
    ranks, _ = baselines.factor_ranks(calibration.shape, 0.3)
    for source, layer in zip(calibration.model.model.layers, result.model.model.layers, strict=True):
        for role in ROLES:
            W = weight_of(source, role)
            tail = torch.linalg.svdvals(W)[ranks[role] :].square().sum()
            torch.testing.assert_close((W - weight_of(layer, role)).square().sum(), tail, rtol=1e-4, atol=0)


def test_a_gram_matrix_with_negative_eigenvalues_from_rounding_has_a_factor():
    x = torch.randn(30, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = x.T @ x / 30
    rounded = gram - 2e-6 * gram.diagonal().mean() * torch.eye(48)
    L = baselines.cholesky(rounded)
    assert torch.linalg.eigvalsh(rounded)[0] < 0
    torch.testing.assert_close(L @ L.T, gram, rtol=0, atol=1e-4)
    assert L.equal(L.tril())


def test_svd_llm_loss_is_the_whitened_tail_and_below_svd(calibration):
    whitened, plain = (BASELINES[name](calibration, 0.3).model for name in ("svd_llm", "svd"))
    ranks, _ = baselines.factor_ranks(calibration.shape, 0.3)
    for index, grams in enumerate(calibration.grams):
        for role in ROLES:
            W = weight_of(calibration.model.model.layers[index], role)
            x = inputs_of(calibration.model, role, index, calibration.tokens)
            losses = [
                (x @ (W - weight_of(model.model.layers[index], role)).T).square().sum(1).mean()
                for model in (whitened, plain)
            ]
            values, vectors = torch.linalg.eigh(grams[INPUT_OF[role]])
            root = vectors * values.clamp_min(0).sqrt()
            tail = torch.linalg.svdvals(W @ root)[ranks[role] :].square().sum()
            torch.testing.assert_close(losses[0], tail, rtol=1e-3, atol=0)
            assert losses[0] < losses[1]


def test_modegpt_mlp_is_least_squares_on_the_kept_channels(calibration):
    result = BASELINES["modegpt"](calibration, 0.25)
    widths = baselines.widths_for(calibration.shape, 0.25, attention=True)
    for index, layer in enumerate(result.model.model.layers):
        source = calibration.model.model.layers[index]
        x = inputs_of(calibration.model, "down", index, calibration.tokens)
        gram = x.T @ x / len(x)
        ridge = gram.diagonal().mean() * torch.eye(len(gram))
        leverage = (gram @ torch.linalg.inv(gram + ridge)).diagonal()
        kept = weight_of(layer, "down").abs().sum(0).nonzero().flatten()
        assert kept.tolist() == leverage.topk(widths.channels).indices.sort().values.tolist()
        wanted = torch.linalg.lstsq(x[:, kept], x @ weight_of(source, "down").T).solution.T
        torch.testing.assert_close(weight_of(layer, "down")[:, kept], wanted, rtol=1e-3, atol=1e-3)
        for role in ("gate", "up"):
            assert torch.equal(weight_of(layer, role)[kept], weight_of(source, role)[kept])


def test_modegpt_values_lose_the_tail_of_the_joint_decomposition(calibration):
    shape, widths = calibration.shape, baselines.widths_for(calibration.shape, 0.25, attention=True)
    result = BASELINES["modegpt"](calibration, 0.25)
    for index, grams in enumerate(calibration.grams):
        values, vectors = torch.linalg.eigh(grams["q"])
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        for head in range(shape.kv_heads):
            source, ours = (
                root @ maps_of(model.model.layers[index], shape, head) for model in (calibration.model, result.model)
            )
            tail = torch.linalg.svdvals(source)[widths.values :].square().sum()
            torch.testing.assert_close((source - ours).square().sum(), tail, rtol=1e-3, atol=0)
            assert torch.linalg.matrix_rank(ours, rtol=1e-5) == widths.values


def maps_of(layer, shape, head):
    """Return `W_v [W_o,1 … W_o,g]` of one KV head, `[d, g d]`."""
    h, g = shape.head_dim, shape.group
    W_v = weight_of(layer, "v")[head * h : (head + 1) * h].T
    W_o = weight_of(layer, "o")
    return torch.cat([W_v @ W_o[:, i * h : (i + 1) * h].T for i in range(head * g, (head + 1) * g)], 1)


def test_modegpt_at_full_rank_is_the_identity(calibration, tokens):
    model = copy.deepcopy(calibration.model)
    for layer, grams in zip(model.model.layers, calibration.grams, strict=True):
        baselines.decompose_values(layer, grams["affine"], calibration.shape, calibration.shape.head_dim)
        baselines.nystroem(layer, grams["down"], calibration.shape.intermediate_size)
    v = weight_of(calibration.model.model.layers[0], "v")
    assert (weight_of(model.model.layers[0], "v") - v).abs().max() > 0.1
    torch.testing.assert_close(logits(model, tokens), logits(calibration.model, tokens), rtol=1e-2, atol=1e-2)


def loop_scores(name, model, calibration, index):
    """Return the scores of pairs `[K][h/2]`, value dims `[K][h]` and channels `[I]`, one structure at a time."""
    shape, layer = calibration.shape, model.model.layers[index]
    h, g, K = shape.head_dim, shape.group, shape.kv_heads
    W = {role: weight_of(layer, role) for role in ROLES}
    norm = {role: inputs_of(model, role, index, calibration.tokens).square().mean(0).sqrt() for role in ROLES}

    def rows(role, heads, p):
        return torch.stack([W[role][i * h + dim] for i in heads for dim in (p, p + h // 2)])

    def pair(k, p):
        q_rows, k_rows = rows("q", range(k * g, (k + 1) * g), p), rows("k", [k], p)
        if name == "magnitude":
            return q_rows.square().sum() + k_rows.square().sum()
        if name == "wanda_structured":
            return (q_rows.abs() * norm["q"]).sum() + (k_rows.abs() * norm["k"]).sum()
        x = inputs_of(model, "q", index, calibration.tokens)
        return ((x @ q_rows.T).square().sum() * (x @ k_rows.T).square().sum()).sqrt()

    def value(k, j):
        columns = [i * h + j for i in range(k * g, (k + 1) * g)]
        if name == "magnitude":
            return W["o"][:, columns].square().sum() + W["v"][k * h + j].square().sum()
        return (W["o"][:, columns].abs() * norm["o"][columns]).sum()

    def channel(c):
        if name == "magnitude":
            return W["gate"][c].square().sum() + W["up"][c].square().sum() + W["down"][:, c].square().sum()
        return (W["down"][:, c].abs() * norm["down"][c]).sum()

    return (
        torch.tensor([[pair(k, p) for p in range(h // 2)] for k in range(K)]),
        torch.tensor([[value(k, j) for j in range(h)] for k in range(K)]),
        torch.tensor([channel(c) for c in range(shape.intermediate_size)]),
    )


@pytest.mark.parametrize("name", STRUCTURED)
def test_exactly_the_lowest_scores_are_dropped(name, calibration):
    result = BASELINES[name](calibration, 0.25)
    shape, widths = calibration.shape, baselines.widths_for(calibration.shape, 0.25, attention=True)
    h, K = shape.head_dim, shape.kv_heads
    for index, layer in enumerate(result.model.model.layers):
        source = calibration.model.model.layers[index]
        pairs, values, channels = loop_scores(name, calibration.model, calibration, index)
        alive = {role: weight_of(layer, role).abs().sum(1) > 0 for role in ("q", "k", "v", "gate", "up")}
        kept = pairs >= pairs.sort(1, descending=True).values[:, widths.pairs - 1 : widths.pairs]
        assert torch.equal(alive["k"].view(K, 2, h // 2), kept[:, None].expand(K, 2, h // 2))
        assert torch.equal(alive["q"].view(K, shape.group, 2, h // 2).all(1), kept[:, None].expand(K, 2, h // 2))
        assert torch.equal(alive["q"].view(K, shape.group, 2, h // 2).any(1), kept[:, None].expand(K, 2, h // 2))
        unchanged = ["q", "k"]
        if name != "modegpt":
            kept = values >= values.sort(1, descending=True).values[:, widths.values - 1 : widths.values]
            assert torch.equal(alive["v"].view(K, h), kept)
            columns = (weight_of(layer, "o").abs().sum(0) > 0).view(K, shape.group, h)
            assert torch.equal(columns, kept[:, None].expand_as(columns))
            kept = channels >= channels.sort(descending=True).values[widths.channels - 1]
            assert torch.equal(alive["gate"], kept)
            assert torch.equal(alive["up"], kept)
            assert torch.equal(weight_of(layer, "down").abs().sum(0) > 0, kept)
            unchanged += ["v", "gate", "up"]
        for role in unchanged:
            assert torch.equal(weight_of(layer, role)[alive[role]], weight_of(source, role)[alive[role]])


def test_scores(calibration):
    """Scores agree up to a factor: some of the literal ones are sums over tokens where the others are means."""
    layer, grams, shape = calibration.model.model.layers[1], calibration.grams[1], calibration.shape
    ours = {
        "modegpt": (baselines.cr_scores(layer, grams, shape),),
        "wanda_structured": vars(baselines.wanda_scores(layer, grams, shape)).values(),
        "magnitude": vars(baselines.magnitude_scores(layer, shape)).values(),
    }
    for name, scores in ours.items():
        for score, plain in zip(scores, loop_scores(name, calibration.model, calibration, 1), strict=name != "modegpt"):
            torch.testing.assert_close(score / score.mean(), (plain / plain.mean()).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", STRUCTURED)
def test_what_a_smaller_checkpoint_would_store(name, calibration):
    """The counted parameters are the nonzero weights of the simulated model."""
    result = BASELINES[name](calibration, 0.25)
    nonzero = sum(int((linear(layer, role).weight != 0).sum()) for layer in result.model.model.layers for role in ROLES)
    assert nonzero == result.stored


def test_mlp_only_leaves_attention_alone(calibration):
    for name in ("magnitude_mlp", "wanda_mlp", "modegpt_mlp"):
        result = BASELINES[name](calibration, 0.25)
        for source, layer in zip(calibration.model.model.layers, result.model.model.layers, strict=True):
            for role in ("q", "k", "v", "o"):
                assert torch.equal(weight_of(layer, role), weight_of(source, role))


@torch.no_grad()
def streams_of(model, tokens):
    """Return the residual stream before each norm, in order, float64 `[tokens, d]`."""
    seen = []
    hooks = [
        norm.register_forward_pre_hook(lambda m, a: seen.append(a[0].double().flatten(0, 1)))
        for layer in model.model.layers
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_slicegpt_keeps_the_stream_in_k_directions(calibration, tokens):
    kept = 30
    model = baselines.slice_to(calibration, kept)
    for stream in streams_of(model, tokens):
        values = torch.linalg.svdvals(stream)
        assert values[kept] < 1e-5 * values[0] < values[kept - 1]


def test_slicegpt_deletes_the_tail_of_the_pca(calibration):
    kept = 30
    sliced = streams_of(baselines.slice_to(calibration, kept), calibration.tokens)
    dense = streams_of(calibration.model, calibration.tokens)
    assert_tail_deleted(dense[0], sliced[0], kept)
    # After the first attention: its output for the sliced embedding, minus the tail of that output.
    assert_tail_deleted(fused_first_attention(calibration, sliced[0]), sliced[1], kept)


def assert_tail_deleted(before, after, kept):
    """Check that what is missing, in units of the norm's output, is the tail of that output's singular values."""
    size = before.square().mean(1, keepdim=True).add(1e-6).sqrt()
    tail = torch.linalg.svdvals(before / size)[kept:].square().sum()
    torch.testing.assert_close(((before - after) / size).square().sum(), tail, rtol=1e-3, atol=0)


@torch.no_grad()
def fused_first_attention(calibration, stream):
    """Return `x + attention(norm(x))` of the source's first layer."""
    model = calibration.model
    seen = []
    layer = model.model.layers[0]
    hook = layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a: seen.append(a[0].double()))
    embedded = stream.float().view(*calibration.tokens.shape, -1)
    model(inputs_embeds=embedded, use_cache=False)
    hook.remove()
    return seen[0].flatten(0, 1)


def test_slicegpt_counts_what_is_left_and_the_shortcuts(calibration):
    shape, k = calibration.shape, 30
    d, stored = shape.hidden_size, 0
    for index in range(shape.layers):
        out = k if index + 1 < shape.layers else d
        for role, sizes in shape.linear_shapes().items():
            other = next(size for size in sizes if size != d) if sizes != (d, d) else d
            stored += other * (out if role == "down" else k)
        stored += k * k + k * out
    assert baselines.sliced_weights(shape, k) == stored
    assert baselines.sliced_weights(shape, d) == decoder_weights(shape) + 2 * shape.layers * d * d


@pytest.fixture(scope="module")
def biased() -> Calibration:
    """Return a model whose queries, keys and values have biases."""
    tokens = torch.randint(VOCABULARY, (10, 32), generator=torch.Generator().manual_seed(1))
    return Calibration(build_model("qwen2-gqa"), tokens, batch_size=4)


@torch.no_grad()
def test_modegpt_with_biases(biased):
    """The joint decomposition of values is that of inputs with a 1, and a dropped pair loses its bias."""
    shape, widths = biased.shape, baselines.widths_for(biased.shape, 0.25, attention=True)
    result = BASELINES["modegpt"](biased, 0.25)
    h, g, d = shape.head_dim, shape.group, shape.hidden_size
    for index, (source, layer) in enumerate(zip(biased.model.model.layers, result.model.model.layers, strict=True)):
        assert linear(source, "v").bias.abs().min() > 0
        x = inputs_of(biased.model, "q", index, biased.tokens)
        values, new_values = (linear(one, "v").double()(x) for one in copy.deepcopy((source, layer)))
        for head in range(shape.kv_heads):
            rows = slice(head * h, (head + 1) * h)
            outputs, new_outputs = (
                [weight_of(one, "o")[:, i * h : (i + 1) * h].T for i in range(head * g, (head + 1) * g)]
                for one in (source, layer)
            )
            before = torch.cat([values[:, rows] @ each for each in outputs], 1)
            after = torch.cat([new_values[:, rows] @ each for each in new_outputs], 1)
            tail = torch.linalg.svdvals(before)[widths.values :].square().sum()
            torch.testing.assert_close((before - after).square().sum(), tail, rtol=1e-3, atol=0)
            energies = [linear(copy.deepcopy(source), role).double()(x).square().sum(0) for role in ("q", "k")]
            score = torch.stack([each.view(shape.kv_heads, -1, 2, h // 2).sum((1, 2))[head] for each in energies])
            kept = score.prod(0).topk(widths.pairs).indices.sort().values
            bias = linear(layer, "k").bias[rows].view(2, h // 2)
            assert torch.equal(bias.abs().sum(0).nonzero().flatten(), kept)
            assert torch.equal(bias[:, kept], linear(source, "k").bias[rows].view(2, h // 2)[:, kept])
        assert affine_of(layer, "q").shape == (shape.heads * h, d + 1)


def test_factors_leave_biases_alone(biased):
    result = BASELINES["svd_llm"](biased, 0.25)
    for source, layer in zip(biased.model.model.layers, result.model.model.layers, strict=True):
        for role in ("q", "k", "v"):
            assert torch.equal(linear(source, role).bias, linear(layer, role).bias)


def test_an_unsliced_model_with_biases_answers_alike(biased, tokens):
    whole = baselines.slice_to(biased, biased.shape.hidden_size)
    torch.testing.assert_close(logits(whole, tokens), logits(biased.model, tokens), rtol=1e-4, atol=1e-4)


def test_biases_of_the_mlp_are_refused(tokens):
    with pytest.raises(ValueError, match="biases in the MLP"):
        Calibration(build_model("llama-gqa-bias"), tokens)


def test_an_mlp_without_a_gate_is_refused(tokens):
    with pytest.raises(ValueError, match="gate"):
        Calibration(build_model("starcoder2-window"), tokens)


def test_the_mlp_alone_has_only_so_much(calibration):
    with pytest.raises(ValueError, match="the MLP alone"):
        BASELINES["modegpt_mlp"](calibration, 0.9)
