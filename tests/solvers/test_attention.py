"""Maps refined on sampled attention: the loss is literal, no optimiser beats it, and it is the measured error."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from a3cli.methods.attention import VALIDATION_EVERY, split
from a3cli.solvers import attention
from a3cli.solvers.attention import AttentionProblem, SampledHead, alibi_slopes, whitening
from a3cli.solvers.rope import as_pairs, distances_beyond, real_map
from a3cli.solvers.samples import NAMES, merge_samples
from a3cli.solvers.sampling import sampled_blocks, sampled_queries
from tests.conftest import (
    CONTEXT,
    attention_of,
    by_token,
    decoder_layers,
    gain_of,
    output_linear,
    post_norms,
    reseal,
)

PAIRS = torch.tensor([1.0, 0.4, 0.1, 0.02], dtype=torch.float64)
SLOTS = torch.tensor([0.9, 0.06], dtype=torch.float64)
H, GROUP, LENGTH, BLOCKS, WINDOW = 8, 2, 12, 3, 5


def sampled(*, window=LENGTH, rank=H, seed=0):
    """Return a head of random queries and keys of `rank` dims, every second query sampled, and its output weights."""
    torch.manual_seed(seed)
    rows = torch.arange(1, LENGTH, 2)
    mix = torch.randn(rank, H)
    seen = torch.stack([(rows - window + 1).clamp_min(0), rows], -1).expand(BLOCKS, -1, -1)
    output = torch.randn(GROUP, H, 20)
    return SampledHead(
        queries=1.2 * torch.randn(BLOCKS, len(rows), GROUP, rank) @ mix,
        keys=torch.randn(BLOCKS, LENGTH, rank) @ mix,
        values=torch.randn(BLOCKS, LENGTH, H),
        seen=seen.float(),
        pairs=PAIRS,
        scale=H**-0.5,
        output_gram=output @ output.mT,
    ), output


def start(seed=1):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(2, 2, 4, 2, generator=generator, dtype=torch.float64)
    return torch.complex(*parts[0]), torch.complex(*parts[1])


def rotated(x, place, frequencies):
    """Return one vector `[2n]` with pairs `(p, p + n)`, rotated by the rotation matrices of RoPE."""
    first, second = x.chunk(2)
    cos, sin = (place * frequencies).cos(), (place * frequencies).sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos])


def literal_loss(head, output, query, key, slots=SLOTS):
    """Return the difference of the small head's and the full head's attention, one query, head and key at a time."""
    loss, maps = 0.0, [real_map(m[None])[0] for m in (query, key)]
    for block in range(BLOCKS):
        for row in range(head.queries.shape[1]):
            first, place = (int(x) for x in head.seen[block, row])
            values = head.values[block, first : place + 1].double()
            for i in range(GROUP):
                outputs = []
                for q_map, k_map, turns in ((torch.eye(H), torch.eye(H), PAIRS), (*maps, slots)):
                    q = rotated(head.queries[block, row, i].double() @ q_map.double(), place, turns)
                    ks = [
                        rotated(head.keys[block, n].double() @ k_map.double(), n, turns)
                        for n in range(first, place + 1)
                    ]
                    scores = torch.stack(ks) @ q / math.sqrt(H)
                    if head.slopes is not None:
                        scores += head.slopes[i] * (torch.arange(first, place + 1) - place)
                    weights = scores.softmax(0)
                    outputs.append(weights @ values @ output[i].double())
                loss += (outputs[0] - outputs[1]).square().sum().item()
    return loss / (BLOCKS * head.queries.shape[1])


@pytest.mark.parametrize("window", [LENGTH, WINDOW])
def test_loss_is_the_literal_one(window):
    head, output = sampled(window=window)
    query, key = start()
    found = AttentionProblem(head).loss(query, key, SLOTS)
    assert found == pytest.approx(literal_loss(head, output, query, key), rel=1e-4)


def test_loss_with_alibi_is_the_literal_one():
    head, output = sampled()
    head = replace(head, slopes=torch.tensor([0.5, 0.125]))
    found = AttentionProblem(head).loss(*start(), SLOTS)
    assert found == pytest.approx(literal_loss(head, output, *start()), rel=1e-4)
    assert found != pytest.approx(literal_loss(replace(head, slopes=None), output, *start()), rel=1e-2)


@pytest.mark.parametrize("heads", [4, 6, 12, 32])
def test_slopes_are_those_of_transformers_class(heads):
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bias = build_mpt_alibi_tensor(heads, 10).squeeze().double()
    expected = alibi_slopes(heads).double()[:, None] * torch.arange(-9, 1)
    torch.testing.assert_close(bias, expected)


def test_it_does_not_matter_how_it_is_cut(monkeypatch):
    head, _ = sampled()
    whole = AttentionProblem(head)
    monkeypatch.setattr(attention, "ENTRIES", 20)
    pieces = AttentionProblem(head)
    assert len(whole.pieces) == 1 < BLOCKS < len(pieces.pieces)
    assert pieces.loss(*start(), SLOTS) == pytest.approx(whole.loss(*start(), SLOTS), rel=1e-5)
    refined = [p.refine(*start(), SLOTS, judge=p, iterations=3, penalty=None) for p in (whole, pieces)]
    torch.testing.assert_close(refined[0].query, refined[1].query, rtol=1e-2, atol=1e-2)


def test_whole_heads_lose_nothing():
    head, _ = sampled()
    eye = torch.eye(4, dtype=torch.complex128)
    problem = AttentionProblem(head)
    assert problem.loss(eye, eye, PAIRS) < 1e-9
    assert problem.loss(*start(), SLOTS) > 1


def adam(problem, maps, steps=1000, rate=0.01):
    """Return the loss that a generic optimiser reaches from these maps."""
    variables = [torch.view_as_real(x.to(torch.complex64)).clone().requires_grad_() for x in maps]
    optimizer, turns = torch.optim.Adam(variables, lr=rate), problem._turns(SLOTS)
    for _ in range(steps):
        optimizer.zero_grad()
        found = [torch.view_as_complex(x) for x in variables]
        sum(problem._error(i, found, turns) for i in range(len(problem.pieces))).backward()
        optimizer.step()
    return problem.loss(*(torch.view_as_complex(x.detach()) for x in variables), SLOTS)


@pytest.mark.slow
def test_no_optimiser_finds_better_maps():
    """Start from the same maps, near a minimum, and from our result."""
    problem = AttentionProblem(sampled()[0])
    near = [torch.eye(4, dtype=torch.complex128)[:, [0, 2]] + 0.2 * x for x in start()]
    found = problem.refine(*near, SLOTS, judge=problem, iterations=150, penalty=None)
    maps = found.query, found.key
    ours = problem.loss(*maps, SLOTS)
    assert (found.before, found.after) == (problem.loss(*near, SLOTS), ours)
    assert ours < 0.7 * found.before
    assert ours < 1.02 * adam(problem, near)
    assert ours < 1.02 * adam(problem, maps, rate=0.001)


def test_what_fits_in_smaller_heads_is_found():
    """Queries and keys of only two pairs lose nothing in heads of two slots with the same frequencies."""
    head, _ = sampled()
    keep = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    head = replace(head, queries=head.queries * keep, keys=head.keys * keep)
    problem = AttentionProblem(head)
    near = [torch.eye(4, dtype=torch.complex128)[:, [1, 3]] + 0.3 * x for x in start()]
    found = problem.refine(*near, PAIRS[[1, 3]], judge=problem, iterations=100, penalty=None)
    assert problem.loss(found.query, found.key, PAIRS[[1, 3]]) < 1e-3 * problem.loss(*near, PAIRS[[1, 3]])


def test_a_penalty_pulls():
    head, _ = sampled()
    problem, wanted = AttentionProblem(head), start(5)[0]

    def penalty(query, key):
        return 1e6 * (query - wanted).abs().square().sum()

    found = problem.refine(*start(), SLOTS, judge=problem, iterations=100, penalty=penalty)
    assert (found.query - wanted).abs().max() < 0.01


def test_the_closed_form_stands_where_numbers_overflow():
    head, _ = sampled()
    problem = AttentionProblem(head)

    def penalty(query, key):
        return math.nan * query.abs().sum()

    found = problem.refine(*start(), SLOTS, judge=problem, iterations=5, penalty=penalty)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip((found.query, found.key), start(), strict=True))
    assert found.after == found.before > 0


def some_blocks(head, chosen):
    """Return the problem for some blocks of the same heads."""
    parts = ("queries", "keys", "values", "seen")
    return AttentionProblem(replace(head, **{name: getattr(head, name)[chosen] for name in parts}))


@pytest.mark.parametrize("seed", range(3))
def test_other_samples_tell_when_to_stop(seed, monkeypatch):
    """A long fit to two blocks overfits them; with validation on others, the result is no worse than the start."""
    monkeypatch.setattr("tests.solvers.test_attention.BLOCKS", 402)
    head, _ = sampled(seed=seed)
    fitted, judge, text = (some_blocks(head, slice(*part)) for part in ((0, 2), (2, 102), (102, 402)))
    eye = torch.eye(4, dtype=torch.complex128)[:, [0, 3]]
    closed = [eye + 0.1 * x for x in start(seed)]
    alone, judged = (fitted.refine(*closed, SLOTS, judge=by, iterations=100, penalty=None) for by in (fitted, judge))
    assert judged.before == judge.loss(*closed, SLOTS)
    assert judged.after == judge.loss(judged.query, judged.key, SLOTS) <= judged.before
    before, blind, seen = (text.loss(*maps, SLOTS) for maps in (closed, *((x.query, x.key) for x in (alone, judged))))
    assert seen < blind
    assert seen < 1.01 * before


def named(blocks, rows=8):
    """Return samples of one dim that encode their block and query."""
    place = torch.arange(blocks)[:, None, None]
    keys = {name: place.expand(-1, 16, 1).float() for name in ("sample_k", "sample_v")}
    queries = (100 * place + torch.arange(rows)[:, None]).float()
    return {"sample_q": queries, "sample_seen": queries.expand(-1, -1, 2), **keys}


@pytest.mark.parametrize(
    ("blocks", "all_others", "few", "judging"),
    [(2, [0], [0], [1]), (3, [0, 2], [0], [1]), (10, [0, 2, 3, 4, 6, 7, 8], [0, 4, 8], [1, 5, 9])],
)
def test_blocks_that_judge_are_not_fitted(blocks, all_others, few, judging):
    for is_few, expected in ((False, all_others), (True, few)):
        for part, chosen in zip(split(named(blocks), few=is_few), (expected, judging), strict=True):
            assert set(part) == set(NAMES)
            assert all(
                x[:, 0, 0].tolist() == [100 * c for c in chosen] for x in (part["sample_q"], part["sample_seen"])
            )
            assert all(x[:, 0, 0].tolist() == chosen for x in (part["sample_k"], part["sample_v"]))


def test_queries_judge_where_there_is_one_block():
    for few, expected in ((False, [0, 2, 3, 4, 6, 7]), (True, [0, 4])):
        for part, chosen in zip(split(named(1), few=few), (expected, [1, 5]), strict=True):
            assert part["sample_q"][0, :, 0].tolist() == part["sample_seen"][0, :, 1].tolist() == chosen
            assert part["sample_k"].shape == part["sample_v"].shape == (1, 16, 1)
    fitted, judging = split(named(1, rows=1), few=False)
    assert fitted["sample_q"].shape == judging["sample_q"].shape == (1, 1, 1)


def test_whitened_samples_are_white():
    head, _ = sampled()
    z = as_pairs(head.keys).flatten(0, 1).to(torch.complex128)
    white = z @ whitening(as_pairs(head.keys)).conj()
    torch.testing.assert_close(white.mT @ white.conj() / len(z), torch.eye(4, dtype=torch.complex128))


def test_distances_beyond():
    found = distances_beyond(512, 4096)
    assert (found.delta.min(), found.delta.max()) == (512, 4095)
    assert found.weight.sum().item() == pytest.approx(1)
    near = found.weight[found.delta < 1024].sum().item()
    assert near == pytest.approx(1 / 3, abs=0.01)  # one octave out of three
    assert distances_beyond(512, 512) is None


@pytest.mark.parametrize(("blocks", "length", "kept"), [(3, 32, 3), (128, 512, 64), (128, 2048, 16), (4, 131072, 1)])
def test_blocks_that_are_kept(blocks, length, kept):
    found = sampled_blocks(blocks, length)
    assert len(set(found)) == kept == len(found)
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] < blocks


@pytest.mark.parametrize(("length", "kept"), [(1, 1), (7, 1), (8, 1), (40, 5), (512, 64), (4096, 512), (131072, 512)])
def test_queries_that_are_kept(length, kept):
    found = list(sampled_queries(length))
    assert found == sorted(found)
    assert found[-1] == length - 1
    assert len(found) == kept


@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa-bias",
        "mistral-gqa",
        "qwen2-window",
        "starcoder2-window",
        "nemotron-gqa",
        "granite-gqa",
        "qwen3-window",
        "smollm3-window",
        "gemma3-gqa",
    ],
)
def test_samples_are_the_models_own(name, a3, checkpoint, text_file, tmp_path):
    """Samples are rounded heads of q, k and v before RoPE; each query's visible keys are those that it attends to."""
    from transformers import AutoModelForCausalLM

    folder = checkpoint(name)
    settings = ("--samples", 3, "--seq-len", 40, "--batch-size", 2)
    assert a3("calibrate", folder, "--dataset", text_file, *settings, "--work", tmp_path).code == 0
    blocks = load_file(tmp_path / "calibration" / "tokens.safetensors")["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen = {}
    for index, layer in enumerate(model.model.layers):
        for part in "qkv":
            module = getattr(layer.self_attn, f"{part}_norm", getattr(layer.self_attn, f"{part}_proj"))
            module.register_forward_hook(lambda _m, _i, out, at=(index, part): seen.update({at: by_token(out, model)}))
    with torch.inference_mode():
        attentions = model(blocks, output_attentions=True).attentions
    rows = list(sampled_queries(40))
    for index, weights in enumerate(attentions):
        stored = load_file(tmp_path / "calibration" / f"layer-{index:03d}.safetensors")
        for part in "qkv":
            expected = seen[index, part][:, rows] if part == "q" else seen[index, part]
            torch.testing.assert_close(stored[f"sample_{part}"].float(), expected, rtol=0.01, atol=0.01)
        attended = weights[:, :, rows].amax(1) > 0  # [B, R, T]
        places = torch.arange(40)
        first, last = stored["sample_seen"].long().unbind(-1)
        assert torch.equal(attended, (places >= first[..., None]) & (places <= last[..., None]))


def test_merged_samples_are_of_all():
    """The merged samples have as many blocks as one calibration keeps, taken from each part."""
    parts = [{name: torch.full((40, 1024, 2), float(i)) for name in NAMES} for i in range(2)]
    merged = merge_samples(parts)
    assert all(len(value) == 32 for value in merged.values())
    assert [int((merged["sample_q"][:, 0, 0] == i).sum()) for i in range(2)] == [16, 16]


@pytest.mark.parametrize(
    "name",
    [
        *("llama-gqa-bias", "llama-yarn", "mistral-gqa", "starcoder2-gqa", "nemotron-gqa", "granite-gqa"),
        *("gemma2-gqa", "qwen3-gqa", "mpt-mha"),
    ],
)
def test_predicted_error_is_the_measured_one(name, a3, checkpoint, text_file, tmp_path):
    """Compare the first layer's attention in source and export on the validation blocks; only QK is cut."""
    from transformers import AutoModelForCausalLM

    folder, work, out = checkpoint(name), ("--work", tmp_path / "work"), tmp_path / "out"
    text = ("--dataset", text_file, "--samples", 8, "--seq-len", CONTEXT // 2)
    assert a3("calibrate", folder, *text, *work).code == 0
    cut = ("--components", "qk", "--budget", 0.12, "--head-multiple", 2, "--shape", "per-layer")
    solved = a3("solve", *cut, *work, "--json").json
    assert a3("export", out, *work).code == 0
    stored = load_file(tmp_path / "work" / "calibration" / "layer-000.safetensors")
    blocks = load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["tokens"][1::VALIDATION_EVERY]
    heads, behind = [], []
    for model_folder in (folder, out):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, trust_remote_code=True).eval()
        found = []
        layer = decoder_layers(model)[0]
        projection, output_weight = output_linear(attention_of(layer))
        for norm in list(post_norms(layer).values())[:1]:
            norm.register_forward_pre_hook(lambda norm, args: behind.append((gain_of(norm), args[0])))
        projection.register_forward_pre_hook(lambda _m, args, into=found: into.append(args[0]))
        with torch.inference_mode():
            model(blocks)
        heads.append(found[0].unflatten(-1, (4, -1)))
        weight = output_weight.detach().unflatten(1, (4, -1)).permute(1, 2, 0)  # [H, h, d]
    rows = list(sampled_queries(blocks.shape[1]))
    wrong = torch.einsum("brih,ihd->brid", (heads[1] - heads[0])[:, rows], weight)
    wrong = wrong * getattr(model.config, "residual_multiplier", 1.0)
    if behind:
        gain, output = behind[0]  # of the source
        wrong = wrong * gain / (output[:, rows].square().mean(-1)[..., None, None] + 1e-6).sqrt()
    residual = stored["tokens"] / stored["attention_inverse"]
    measured = (wrong.double().square().sum((-1, -2)).mean() / residual).item()
    predicted = solved["per_layer"][0]["attention_error"]
    assert solved["sizes"][0]["qk"] < 16
    assert predicted["refined"] == pytest.approx(measured, rel=0.05)
    assert predicted["refined"] < predicted["closed_form"]


@pytest.mark.parametrize("name", ["llama-yarn", "qwen3-bias", "qwen3-window", "smollm3-bias", "gemma3-gqa"])
def test_energy_of_attention_is_that_of_the_models_own(name, a3, checkpoint, text_file, tmp_path):
    """Compare it with attention that weighs all visible keys alike, on the validation blocks."""
    from transformers import AutoModelForCausalLM

    folder, work = checkpoint(name), ("--work", tmp_path / "work")
    text = ("--dataset", text_file, "--samples", 8, "--seq-len", CONTEXT // 2)
    assert a3("calibrate", folder, *text, *work).code == 0
    cut = ("--components", "mlp", "--budget", 0.1, "--mlp-multiple", 8, "--sensitivity", "residual")
    solved = a3("solve", *cut, *work, "--json").json
    blocks = load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["tokens"][1::VALIDATION_EVERY]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    values, behind = [], []
    for layer in model.model.layers:
        for norm in post_norms(layer).values():
            norm.register_forward_pre_hook(lambda norm, args: behind.append((norm, args[0])))
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, out: values.append(out.unflatten(-1, (2, 1, 16))))
    with torch.inference_mode():
        attentions = model(blocks, output_attentions=True).attentions
    rows = list(sampled_queries(blocks.shape[1]))
    for index, (weights, value) in enumerate(zip(attentions, values, strict=True)):
        sampled = weights[:, :, rows]
        alike = (sampled > 0).float()
        wrong = torch.einsum("birt,btih->brih", alike / alike.sum(-1, keepdim=True) - sampled, spread_heads(value))
        output = model.model.layers[index].self_attn.o_proj.weight.detach().unflatten(1, (4, -1))
        wrong = torch.einsum("brih,dih->brid", wrong, output)
        if behind:
            norm, output = behind[2 * index]
            wrong = wrong * gain_of(norm) / (output[:, rows, None].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        stored = load_file(tmp_path / "work" / "calibration" / f"layer-{index:03d}.safetensors")
        residual = stored["tokens"] / stored["attention_inverse"]
        measured = (wrong.double().square().sum((-1, -2)).mean() / residual).item()
        assert solved["per_layer"][index]["energy"]["qk"] == pytest.approx(measured, rel=0.03)


def spread_heads(value: torch.Tensor) -> torch.Tensor:
    """Return the values `[B, T, 4, h]` of four query heads from those of two KV heads `[B, T, 2, 1, h]`."""
    return value.expand(-1, -1, -1, 2, -1).flatten(2, 3)


def test_statistics_without_samples_are_refused(a3, checkpoint, text_file, tmp_path):
    from safetensors.torch import save_file

    work = ("--work", tmp_path)
    text = ("--dataset", text_file, "--samples", 2, "--seq-len", 32)
    assert a3("calibrate", checkpoint("llama-gqa"), *text, *work).code == 0
    file = tmp_path / "calibration" / "layer-001.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k not in NAMES}, file)
    reseal(file)
    outcome = a3("solve", "--budget", 0.25, "--mlp-multiple", 8, *work)
    assert (outcome.code, outcome.stderr.count("\n")) == (2, 1)
    assert "layer 1: the statistics have no attention samples" in outcome.stderr
