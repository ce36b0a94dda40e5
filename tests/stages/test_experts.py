"""Models with experts: each expert's statistics, channels and refit, and those that few tokens go through."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from a3cli.models import costs
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.experts import checkpoint_names, hold_apart, stored_name
from a3cli.models.families import FAMILIES
from a3cli.models.model import describe
from a3cli.solvers.mlp import plain_losses
from a3cli.stages.checker import find_loaded
from a3cli.stages.measured_loss import choose_blocks
from a3cli.stream.decoder import Decoder
from tests.conftest import MODELS, VOCABULARY, build_model, build_tokenizer, refused
from tests.helpers.experts import Routed, routed

TEXT = ("--samples", 12, "--seq-len", 80)
CUT = ("--mlp-budget", 0.4, "--components", "mlp", "--mlp-multiple", 8)
PER_LAYER = ("--attention-budget", 0.2, "--mlp-budget", 0.2, "--mlp-multiple", 8, "--head-multiple", 2)
TYPES = ["mixtral-gqa", "qwen3moe-gqa"]


def run(
    a3: Any, source: Path, text: Path, folder: Path, *options: object, budget: tuple[object, ...] = CUT
) -> tuple[Path, Any]:
    """Run calibrate, solve and export; return the export and the result of a3 solve. The work folder is `work`."""
    work = ("--work", folder / "work")
    assert a3("calibrate", source, "--dataset", text, *TEXT, *work).code == 0
    solved = a3("solve", *budget, *options, *work, "--json")
    assert solved.code == 0, solved.stderr
    assert a3("export", folder / "out", *work).code == 0
    return folder / "out", solved


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.inference_mode()
def seen_by(model: Any, blocks: torch.Tensor, layer: int = 0) -> tuple[list[Routed], Any]:
    """Return what goes through each expert of a layer, and the arguments of its stock module."""
    found: list[tuple[torch.Tensor, ...]] = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _m, args: found.append(args))
    model(blocks, use_cache=False)
    handle.remove()
    return routed(experts, found[0]), found[0]


def read(folder: Path, layer: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"layer-{layer:03d}.safetensors")


@pytest.mark.parametrize("name", TYPES)
@torch.inference_mode()
def test_experts_held_apart_answer_like_the_stock_module(name):
    model, tokens = build_model(name), torch.randint(VOCABULARY, (2, 50))
    expected = model(tokens).logits
    weights = [
        [(*gate_up.chunk(2), down) for gate_up, down in zip(block.gate_up_proj, block.down_proj, strict=True)]
        for block in (layer.mlp.experts for layer in model.model.layers)
    ]
    hold_apart(model, FAMILIES[MODELS[name][0].model_type])
    for layer, experts in zip(model.model.layers, weights, strict=True):
        layer.mlp.experts.to_empty(device="cpu")
        for expert, own in zip(layer.mlp.experts, experts, strict=True):
            linears = dict(zip(("gate", "up", "down"), own, strict=True))
            for role, weight in linears.items():
                expert.get_submodule(expert._names[role]).weight.copy_(weight)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_each_expert_is_refit_on_its_own_tokens(name, a3, checkpoint, text_file, tmp_path):
    """The weights that leave the least squared error of the expert's output times its routing weight."""
    source = checkpoint(name)
    out, _ = run(a3, source, text_file, tmp_path)
    blocks = load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["tokens"]
    model = load(source)
    experts, _ = seen_by(model, blocks)
    channels = read(tmp_path / "work" / "solution")["channels"]
    found, down = load(out).model.layers[0].mlp.experts.down_proj, model.model.layers[0].mlp.experts.down_proj
    for index, each in enumerate(experts):
        target = each.weighted @ down[index].double().T
        expected = torch.linalg.lstsq(each.weighted[:, channels[index]], target).solution
        torch.testing.assert_close(found[index].double(), expected.T, rtol=1e-3, atol=1e-3)
    assert len({tuple(own.tolist()) for own in channels}) == len(channels)  # of each expert its own


@pytest.mark.parametrize("method", ["best", "paper"])
@pytest.mark.parametrize("name", TYPES)
@torch.inference_mode()
def test_predicted_loss_is_the_sum_of_the_experts_errors(name, method, a3, checkpoint, text_file, tmp_path):
    """With the routing of the source. The paper's loss leaves out what dropped channels have in common."""
    source = checkpoint(name)
    out, solved = run(a3, source, text_file, tmp_path, "--method", method, "--sensitivity", "residual")
    blocks = load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["tokens"]
    model, smaller = load(source), load(out)
    _, arguments = seen_by(model, blocks)
    error = 0.0
    before, after = (routed_outputs(each.model.layers[0].mlp.experts, arguments) for each in (model, smaller))
    if method == "paper":  # one channel at a time
        experts, channels = routed(model.model.layers[0].mlp.experts, arguments), read(tmp_path / "work" / "solution")
        for each, kept, down in zip(
            experts, channels["channels"], model.model.layers[0].mlp.experts.down_proj.double(), strict=True
        ):
            dropped = [channel for channel in range(96) if channel not in kept]
            error += (each.weighted.square().sum(0) * down.square().sum(0))[dropped].sum()
    else:
        error = sum((one - other).square().sum() for one, other in zip(before, after, strict=True))
    stored = read(tmp_path / "work" / "calibration")
    measured = error * stored["mlp_inverse"] / stored["tokens"] ** 2
    curve = solved.json["per_layer"][0]["curves"]["mlp"]
    predicted = curve["loss"][curve["size"].index(solved.json["sizes"][0]["mlp"])]
    assert predicted == pytest.approx(measured.item(), rel=1e-4)
    assert predicted > 1e-4


def routed_outputs(experts: Any, arguments: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return each expert's output times the routing weights."""
    found = routed(experts, arguments)
    return [each.weighted @ down.double().T for each, down in zip(found, experts.down_proj, strict=True)]


@pytest.mark.parametrize("name", TYPES)
@torch.inference_mode()
def test_predicted_loss_is_the_whole_error_where_a_token_has_one_expert(name, a3, checkpoint, text_file, tmp_path):
    """Nothing in front of the first MLP is cut, so the routing is the source's."""
    source = checkpoint(name, num_experts_per_tok=1)
    out, solved = run(a3, source, text_file, tmp_path, "--sensitivity", "residual")
    blocks, put_out = load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["tokens"], []
    for folder in (source, out):
        model = load(folder)
        model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: put_out.append(output.double()))
        model(blocks)
    stored = read(tmp_path / "work" / "calibration")
    measured = (put_out[1] - put_out[0]).square().sum() * stored["mlp_inverse"] / stored["tokens"] ** 2
    curve = solved.json["per_layer"][0]["curves"]["mlp"]
    predicted = curve["loss"][curve["size"].index(solved.json["sizes"][0]["mlp"])]
    assert predicted == pytest.approx(measured.item(), rel=1e-4)


def without_tokens_for(folder: Path, expert: int, target: Path) -> Path:
    """Copy a checkpoint whose router prefers other experts to this one at every token of the first layer."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    (router,) = [name for name in tensors if name.startswith("model.layers.0.") and name.endswith(".gate.weight")]
    rows = tensors[router].clone()
    rows[expert] = 0
    rows[(expert + 1) % 4], rows[(expert + 2) % 4] = 4 * rows[0], -4 * rows[0]  # one of these is above 0
    rows[(expert + 3) % 4] = 1.6 * rows[0].roll(1)  # seldom above both
    save_file({**tensors, router: rows}, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("method", ["best", "paper"])
@pytest.mark.parametrize("name", TYPES)
def test_experts_with_few_tokens_are_cut_without_a_refit_and_reported(
    name, method, a3, checkpoint, text_file, tmp_path
):
    source = without_tokens_for(checkpoint(name, num_experts_per_tok=1), 1, tmp_path / "source")
    work = tmp_path / "work"
    few_tokens = ("--samples", 8, "--seq-len", 60)
    assert a3("calibrate", source, "--dataset", text_file, *few_tokens, "--work", work).code == 0
    counts = read(work / "calibration")["expert_tokens"].long().tolist()
    few = [expert for expert, count in enumerate(counts) if count < 96]
    assert counts[1] == 0
    assert any(counts[expert] for expert in few)
    assert len(few) < 4
    solved = a3("solve", *CUT, "--method", method, "--work", work, "--json")
    assert solved.json["per_layer"][0]["experts"] == {"tokens": counts, "few_tokens": few}
    assert f"layer 0, MLP: {len(few)} of 4 experts ({', '.join(map(str, few))})" in solved.stderr
    assert "fewer tokens than their 96 channels" in solved.stderr
    assert "by the size of their weights where they saw none" in solved.stderr
    assert a3("export", tmp_path / "out", "--work", work).code == 0
    width = solved.json["sizes"][0]["mlp"]
    before, after = (load(folder).model.layers[0].mlp.experts for folder in (source, tmp_path / "out"))
    energy = read(work / "calibration")["mlp_energy"]
    for expert in few:
        gate, up = before.gate_up_proj[expert].double().chunk(2)
        down = before.down_proj[expert].double()
        score = energy[expert] * down.square().sum(0)
        if counts[expert] == 0:
            score = gate.square().sum(1) * up.square().sum(1) * down.square().sum(0)
        kept = score.argsort(descending=True)[:width].sort().values
        assert torch.equal(after.down_proj[expert], before.down_proj[expert][:, kept])
        assert torch.equal(
            after.gate_up_proj[expert], before.gate_up_proj[expert].unflatten(0, (2, -1))[:, kept].flatten(0, 1)
        )
    assert any("cut without a refit" in warning for warning in a3("inspect", work, "--json").json["warnings"])
    assert a3("verify", tmp_path / "out", "--work", work, "--require-reference").code == 0


@pytest.mark.parametrize("name", TYPES)
def test_verify_notices_one_wrong_expert(name, a3, checkpoint, text_file, tmp_path):
    out, _ = run(a3, checkpoint(name), text_file, tmp_path)
    verify = ("verify", out, "--work", tmp_path / "work", "--require-reference", "--json")
    checks = {each["name"]: each for each in a3(*verify).json["checks"]}
    assert checks["load"]["outcome"] == checks["reference"]["outcome"] == "passed"
    assert checks["reference"]["rounding"] < 2e-5
    # The weights of one expert in another's place: right shapes, wrong values.
    tensors = load_file(out / "model.safetensors")
    one, other = (FAMILIES[MODELS[name][0].model_type].tensor(1, "down", expert=expert) for expert in (0, 1))
    save_file({**tensors, one: tensors[other].clone()}, out / "model.safetensors", metadata={"format": "pt"})
    checks = {each["name"]: each for each in a3(*verify).json["checks"]}
    assert checks["load"]["outcome"] == "passed"
    assert checks["files"]["outcome"] == checks["reference"]["outcome"] == "failed"


@pytest.mark.parametrize("name", TYPES)
def test_every_tensor_of_an_expert_is_compared_with_the_loaded_model(name):
    """What a3 verify expects in the loaded model is where the stock class has put it."""
    family, model = FAMILIES[MODELS[name][0].model_type], build_model(name)
    loaded, experts = model.state_dict(), model.model.layers[1].mlp.experts
    for expert in range(4):
        gate, up = experts.gate_up_proj[expert].chunk(2)
        for role, expected in (("gate", gate), ("up", up), ("down", experts.down_proj[expert])):
            found = find_loaded(loaded, family.tensor(1, role, expert=expert), checkpoint_names(family))
            assert torch.equal(found, expected)
    router = stored_name(family, "model.layers.1.mlp.gate.weight")
    assert torch.equal(find_loaded(loaded, router, checkpoint_names(family)), model.model.layers[1].mlp.gate.weight)
    for unknown in (family.tensor(1, "down", expert=4), "model.layers.1.mlp.experts.0.w9.weight"):
        assert find_loaded(loaded, unknown, checkpoint_names(family)) is None


@torch.inference_mode()
def test_the_measured_loss_is_that_of_stock_models(a3, checkpoint, text_file, tmp_path):
    source = checkpoint("mixtral-gqa")
    out, solved = run(a3, source, text_file, tmp_path)
    tokens = choose_blocks(load_file(tmp_path / "work" / "calibration" / "tokens.safetensors")["held_out"])
    for folder, key in ((source, "before"), (out, "after")):
        losses = torch.nn.functional.cross_entropy(
            load(folder)(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        assert solved.json["measured_loss"]["perplexity"][key] == pytest.approx(losses.exp().item(), rel=2e-3)


def test_inspection_and_report_count_every_expert(a3, checkpoint, text_file, tmp_path):
    out, _ = run(a3, checkpoint("mixtral-gqa"), text_file, tmp_path)
    of_width = 4 * 3 * 48 * 4  # bytes of four experts
    for folder in (tmp_path / "work", out):
        found = a3("inspect", folder, "--json").json
        state = found["layers"][0]["mlp"]
        assert state["bytes"] == {"before": 96 * of_width, "after": state["size"] * of_width}
        assert state["tokens_per_dimension"] == 960 * 2 / 4 / 96
        assert "MLP: 5.0 tokens for each of the 96 dimensions" in " ".join(found["warnings"])
        assert "calibrate on 1,920 or more" in " ".join(found["warnings"])
        assert a3("inspect", folder).code == 0
    assert a3("inspect", tmp_path / "work", "--json").json["layers"][0]["mlp"]["condition"] > 1
    assert a3("report", out, "--html", tmp_path / "report.html").code == 0


def test_calibration_holds_the_experts_of_one_layer(a3, checkpoint, text_file, tmp_path, monkeypatch):
    held, plain = [], Decoder.load

    def load(self: Decoder, *args: Any) -> None:
        of_layers = (name for layer in self.layers for name, value in layer.named_parameters() if not value.is_meta)
        held.append(sum(".experts." in name for name in of_layers))
        plain(self, *args)
        of_layers = (name for layer in self.layers for name, value in layer.named_parameters() if not value.is_meta)
        held.append(sum(".experts." in name for name in of_layers))

    monkeypatch.setattr(Decoder, "load", load)
    work = ("--work", tmp_path / "work")
    assert a3("calibrate", checkpoint("mixtral-gqa"), "--dataset", text_file, *TEXT, *work).code == 0
    assert set(held) == {0, 4 * 3}
    assert held.count(4 * 3) == 2  # layers


def test_losses_without_a_refit_are_the_literal_errors():
    torch.manual_seed(0)
    x, down = torch.randn(40, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    order = torch.randperm(12)
    found = plain_losses(x.T @ x / 40, down, order)
    for kept in range(13):
        dropped = order[kept:]
        expected = (x[:, dropped] @ down[:, dropped].T).square().sum() / 40
        torch.testing.assert_close(found[kept], expected)


@pytest.mark.parametrize("name", TYPES)
def test_all_experts_count_as_weights_and_those_of_a_token_as_flops(name, checkpoint):
    shape = describe(Checkpoint(checkpoint(name))).shape
    attention, expert = 48 * (2 * 64 + 2 * 32), 3 * 48 * 96
    assert costs.linear_weights(shape, shape.sizes) == 2 * (attention + 4 * expert)
    assert costs.prefill_flops_per_token(shape, shape.sizes, 10) == 2 * 2 * (attention + 2 * expert + 10 * 64 * 2)


@pytest.mark.parametrize("name", TYPES)
def test_layers_of_different_width_load_with_their_own_code(name, a3, checkpoint, text_file, tmp_path):
    """Also the decoder alone, and what transformers saves: with the names that checkpoints have for experts."""
    out, solved = run(a3, checkpoint(name), text_file, tmp_path, "--shape", "per-layer", budget=PER_LAYER)
    assert len({each["mlp"] for each in solved.json["sizes"]}) == 2  # five steps of eight channels in two layers
    assert any(each["ov"] < 16 for each in solved.json["sizes"])
    verify = ("verify", out, "--work", tmp_path / "work", "--require-reference", "--trust-remote-code")
    assert a3(*verify).code == 0
    model, tokens = load(out, trust_remote_code=True), torch.randint(VOCABULARY, (2, 40))
    with torch.inference_mode():
        decoder = AutoModel.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
        assert torch.equal(decoder(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "again", trust_remote_code=True)(tokens).logits, model(tokens).logits)


def test_widths_are_what_the_kernel_of_stock_classes_takes(a3, checkpoint, text_file, tmp_path):
    source, work, odd = checkpoint("mixtral-gqa"), ("--work", tmp_path / "work"), ("--mlp-multiple", 12)
    problem = "--mlp-multiple 12", "16 bytes", "use a multiple of 8"
    refused(a3("plan", source, *odd), *problem)
    assert a3("calibrate", source, "--dataset", text_file, *TEXT, *work).code == 0
    refused(a3("solve", "--budget", 0.25, *odd, *work), *problem)
    assert a3("solve", "--attention-budget", 0.25, "--components", "qk,ov", *odd, "--head-multiple", 2, *work).code == 0


@pytest.mark.parametrize("entry", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}])
def test_layers_without_experts_are_refused(entry, a3, checkpoint, text_file, tmp_path):
    source = checkpoint("qwen3moe-gqa", **entry)
    problem = "layers that have no experts", next(iter(entry))
    refused(a3("calibrate", source, "--dataset", text_file, *TEXT, "--work", tmp_path / "work"), *problem)
    refused(a3("plan", source), *problem)


def test_the_count_of_experts_is_written_as_transformers_4_reads_it(a3, checkpoint, text_file, tmp_path):
    source = checkpoint("qwen3moe-gqa")
    assert "num_experts" not in json.loads((source / "config.json").read_text())
    out, _ = run(a3, source, text_file, tmp_path)
    assert json.loads((out / "config.json").read_text())["num_experts"] == 4
    assert load(out).config.num_experts == 4


def test_a_second_sweep_is_refused(a3, checkpoint, text_file, tmp_path):
    work = ("--work", tmp_path / "work")
    assert a3("calibrate", checkpoint("mixtral-gqa"), "--dataset", text_file, *TEXT, *work).code == 0
    refused(a3("solve", "--budget", 0.25, "--sequential", *work), "--sequential", "mixtral", "experts")


@pytest.mark.parametrize("change", [{"num_local_experts": 0}, {"num_local_experts": 10**9}, {"num_experts_per_tok": 5}])
def test_impossible_numbers_of_experts(change, a3, checkpoint, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    config = json.loads((checkpoint("mixtral-gqa") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(a3("plan", folder), "impossible numbers of experts")


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_router_logits_in_the_output_change_nothing(name, a3, text_file, tmp_path):
    """Such configurations are for training; their logits are compared as others."""
    source = tmp_path / "source"
    build_model(name, output_router_logits=True).save_pretrained(source)
    build_tokenizer().save_pretrained(source)
    out, _ = run(a3, source, text_file, tmp_path)
    assert json.loads((out / "config.json").read_text())["output_router_logits"] is True
    assert a3("verify", out, "--work", tmp_path / "work", "--require-reference").code == 0
    text = ("--dataset", text_file, "--samples", 2, "--seq-len", 32)
    assert a3("eval", out, "--against", source, *text).code == 0


@pytest.mark.slow
@torch.inference_mode()
def test_rounding_weights_changes_more_logits_by_changing_the_routing():
    """docs/ci.md has these figures; `-s` prints them."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4}
    dense, routed_anew, routed_alike = [], [], []
    for seed in range(3):
        dense.append(error_of_rounding(build_model("mistral-gqa", seed=seed, intermediate_size=192, **sizes)))
        model = build_model("mixtral-gqa", seed=seed, num_local_experts=16, **sizes)
        routed_anew.append(error_of_rounding(model))
        model = build_model("mixtral-gqa", seed=seed, num_local_experts=16, **sizes)
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(RoutesAsBefore())
        routed_alike.append(error_of_rounding(model))
    print(dense, routed_anew, routed_alike)
    assert min(routed_anew) > 5 * max(dense)
    assert max(routed_alike) < 2 * max(dense)


def error_of_rounding(model: Any) -> float:
    """Return the relative change of all logits if weights are rounded to bfloat16; arithmetic stays float32."""
    tokens = torch.randint(VOCABULARY, (4, 128), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits
    after = model.bfloat16().float()(tokens).logits
    return ((after - before).norm() / before.norm()).item()


class RoutesAsBefore:
    """A hook of a router that has each token go through the experts of the first call."""

    def __init__(self) -> None:
        self.chosen: torch.Tensor | None = None

    def __call__(self, _router: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, chosen = output
        if self.chosen is None:
            self.chosen = chosen
            return output
        weights = logits.float().softmax(-1).gather(1, self.chosen)
        return logits, weights / weights.sum(-1, keepdim=True), self.chosen
