"""Compress through the real command line, load with stock transformers, and compare with a reference.

Each reference is the full-size source with the same solution applied in place and the rest zeroed. It is written here
independently of the package's export.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3cli.models.families import usual_entries
from tests.conftest import (
    DEFAULT,
    LINEAR,
    LLAMA3,
    LONGROPE,
    MODELS,
    SHORT,
    SOLVE,
    VOCABULARY,
    YARN,
    attention_of,
    build_tokenizer,
    can_cut,
    decoder_layers,
    mlp_linears,
    refused,
    slot_dims,
    turning_pairs,
)
from tests.helpers.experts import down_bias, each_down

pytestmark = pytest.mark.usefixtures("hasty")

LENGTH = 120  # tokens of the compared logits, beyond the longrope source's original context
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run_chain(a3, source: Path, text: Path, folder: Path, *solve_options: object, export_options: tuple = ()) -> Path:
    """Run calibrate, solve and export, and return the exported folder. The work folder is `folder/work`."""
    work, out = folder / "work", folder / "out"
    for command in (
        ("calibrate", source, "--dataset", text, "--samples", 6, "--seq-len", 80, "--batch-size", 4),
        ("solve", *solve_options),
        ("export", out, *export_options),
    ):
        outcome = a3(*command, "--work", work)
        assert outcome.code == 0, outcome.stderr
    return out


def load(folder: Path, **options: Any) -> Any:
    """Load a folder with stock transformers and without remote code; check that no weight is unused or missing."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=options.pop("dtype", torch.float32), output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.inference_mode()
def logits(model: Any, length: int = LENGTH) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY - 3, (2, length), generator=torch.Generator().manual_seed(7))
    return model(tokens).logits


@torch.no_grad()
def zeroed_reference(source: Path, work: Path) -> Any:
    """Return the source with dropped pairs and channels zeroed and the OV projector applied to W_v."""
    model = load(source)
    for index, layer in enumerate(decoder_layers(model)):
        solution = load_file(work / "solution" / f"layer-{index:03d}.safetensors")
        if "pairs" in solution:
            attention = attention_of(layer)
            size = attention.head_dim
            gone = torch.ones(size, dtype=torch.bool)
            gone[slot_dims(size, turning_pairs(model.config), solution["pairs"].tolist())] = False
            projectors = solution["value_map"] @ solution["output_map"]
            for module in (attention.q_proj, attention.k_proj):
                for parameter in module.parameters():
                    parameter.view(-1, size, *parameter.shape[1:])[:, gone] = 0
            for parameter in attention.v_proj.parameters():
                for k, head in enumerate(parameter.view(-1, size, *parameter.shape[1:])):
                    head.copy_((projectors[k].T @ head.double()).float())
        if "channels" in solution:
            for weight, channels in each_down(layer, solution["channels"]):
                gone = torch.ones(weight.shape[1], dtype=torch.bool)
                gone[channels] = False
                weight[:, gone] = 0
    return model


@torch.no_grad()
def banded_reference(source: Path, work: Path) -> Any:
    """Return the full-size source with each slot in its own pair, with the manifest's frequency, and the rest zero."""
    model = load(source)
    slots = json.loads((work / "solution" / "manifest.json").read_text())["rope_slots"]
    for index, layer in enumerate(decoder_layers(model)):
        solution = load_file(work / "solution" / f"layer-{index:03d}.safetensors")
        if slots is not None:  # heads are smaller
            mix_heads(layer.self_attn, solution, dims_of_slots(model.config, slots))
        for weight, channels, refit in each_down(layer, solution["channels"], solution["down_weight"]):
            weight.zero_()[:, channels] = refit
        if (bias := down_bias(layer)) is not None:
            bias.copy_(solution["down_bias"])
    if slots is not None:
        turned = sum(slot < turning_pairs(model.config) for slot in slots)
        model.model.rotary_emb = Turning(model.model.rotary_emb, slots[:turned], LENGTH)
    return model


def dims_of_slots(config: Any, slots: list[float]) -> list[int]:
    """Return the dims of a full head that hold the slots of a smaller one."""
    turning = turning_pairs(config)
    turned = sum(slot < turning for slot in slots)
    return slot_dims(config.head_dim, turning, [*range(turned), *range(turning, turning + len(slots) - turned)])


def mix_heads(attention: Any, solution: dict[str, torch.Tensor], dims: list[int]) -> None:
    """Put a solution's smaller heads at some dims of the full ones, and zeros elsewhere."""
    size = attention.head_dim
    for role in ("query", "key", "value"):
        for parameter in getattr(attention, f"{role[0]}_proj").parameters():
            heads = parameter.view(-1, size, *parameter.shape[1:])
            for i, head in enumerate(heads):
                mixed = solution[f"{role}_map"][i * len(solution["key_map"]) // len(heads)].T @ head.double()
                head.zero_()[dims] = mixed.float()
    wide = attention.o_proj.weight.zero_().view(len(attention.o_proj.weight), -1, size)
    wide[:, :, dims] = solution["output_weight"].view(len(wide), wide.shape[1], -1)


class Turning(torch.nn.Module):
    """Replace a stock rotary module: the first pairs rotate like the given, possibly fractional, source pairs."""

    def __init__(self, rotary: Any, slots: list[float], length: int) -> None:
        super().__init__()
        rotary(torch.zeros(1), torch.arange(length)[None])  # longrope chooses the table for this length
        logs = rotary.inv_freq.double().log().tolist()
        below = [min(int(slot), len(logs) - 2) for slot in slots]
        turned = [logs[b] + (slot - b) * (logs[b + 1] - logs[b]) for slot, b in zip(slots, below, strict=True)]
        still = [0.0] * (len(logs) - len(slots))
        self.frequencies = torch.tensor([*torch.tensor(turned, dtype=torch.float64).exp().tolist(), *still])
        self.scaling = rotary.attention_scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angle.cos() * self.scaling, angle.sin() * self.scaling


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ((ours - theirs).norm() / theirs.norm()).item() < tolerance


@pytest.mark.parametrize(("method", "reference"), [("paper", zeroed_reference), ("best", banded_reference)])
@pytest.mark.parametrize("name", [name for name in MODELS if can_cut(name, "mlp")])
def test_export_equals_the_full_size_reference(name, method, reference, a3, checkpoint, text_file, tmp_path):
    source = checkpoint(name)
    options = ("--mlp-budget", 0.3, "--head-multiple", 2, "--mlp-multiple", 8, "--method", method)
    options += ("--attention-budget", 0.3) if can_cut(name, "qk") else ()
    out = run_chain(a3, source, text_file, tmp_path, *options)
    config = usual_entries(json.loads((out / "config.json").read_text()))
    assert config.get("head_dim", 16) == (10 if can_cut(name, "qk") else 16)
    assert config["intermediate_size"] == 64
    small = load(out)
    expected = logits(reference(source, tmp_path / "work"))
    assert_same_logits(logits(small), expected, 2e-4)
    # A compression without effect would pass the line above if nothing had been dropped.
    assert (expected - logits(load(source))).norm() / expected.norm() > 1e-2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen2-gqa", ("--shape", "stock")),
        ("qwen2-gqa", ("--shape", "per-layer", "--sequential")),
        ("starcoder2-gqa", ("--shape", "stock")),
    ],
)
def test_a_configuration_without_head_dim(name, options, a3, checkpoint, text_file, tmp_path):
    """Like Qwen2, it has hidden size over heads; the export equals that of a configuration with head_dim."""
    said, unsaid = checkpoint(name, hidden_size=64), tmp_path / "source"
    shutil.copytree(said, unsaid)
    config = json.loads((unsaid / "config.json").read_text())
    del config["head_dim"]
    (unsaid / "config.json").write_text(json.dumps(config))
    budgets = ("--attention-budget", 0.3, "--mlp-budget", 0.1, "--head-multiple", 2, "--mlp-multiple", 8)
    outs = [run_chain(a3, said, text_file, tmp_path / "said", *budgets, *options)]
    outs.append(run_chain(a3, unsaid, text_file, tmp_path / "unsaid", *budgets, *options))
    models = [load(out, trust_remote_code="per-layer" in options) for out in outs]
    assert torch.equal(*(logits(model) for model in models))


@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa",
        "llama-longrope",
        "starcoder2-gqa",
        "nemotron-gqa",
        "qwen3-window",
        "smollm3-window",
        "qwen3_5-hybrid",
        "mixtral-gqa",
    ],
)
def test_export_generates_with_cache_as_without(name, a3, checkpoint, text_file, tmp_path):
    out = run_chain(
        a3, checkpoint(name), text_file, tmp_path, "--budget", 0.25, "--head-multiple", 2, "--mlp-multiple", 8
    )
    model, tokenizer = load(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("def f(", return_tensors="pt")
    texts = [
        model.generate(**prompt, max_new_tokens=20, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa-bias",
        "llama-yarn",
        "starcoder2-gqa",
        "nemotron-gqa",
        "qwen3-bias",
        "smollm3-bias",
        "qwen3_5-hybrid",
        "mixtral-gqa",
    ],
)
def test_budget_zero_keeps_every_byte(name, a3, checkpoint, text_file, tmp_path):
    source = checkpoint(name)
    out = run_chain(a3, source, text_file, tmp_path, "--budget", 0)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(logits(load(out)), logits(load(source)))


@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("llama-gqa-bias", {"gate_proj", "up_proj", "down_proj"}),
        ("starcoder2-gqa", {"c_fc", "c_proj"}),
        ("qwen3-gqa", {"gate_proj", "up_proj", "down_proj"}),
        ("mixtral-gqa", {"w1", "w2", "w3"}),
    ],
)
def test_mlp_only_leaves_everything_else_bit_identical(name, linears, a3, checkpoint, text_file, tmp_path):
    source = checkpoint(name, dtype=torch.bfloat16)
    out = run_chain(a3, source, text_file, tmp_path, "--budget", 0.2, "--components", "mlp", "--mlp-multiple", 8)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, source))
    changed = {key for key in theirs if ours[key].shape != theirs[key].shape or not torch.equal(ours[key], theirs[key])}
    assert {key.split(".")[-2] for key in changed} == linears
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    assert {key for key in config if config[key] != before.get(key)} == {"intermediate_size"}


@pytest.mark.parametrize("name", ["llama-gqa-bias", "starcoder2-gqa"])
@torch.no_grad()
def test_down_projection_with_a_bias_is_a_regression_with_intercept(name, a3, checkpoint, text_file, tmp_path):
    source, work, out = checkpoint(name), tmp_path / "work", tmp_path / "out"
    a3("calibrate", source, "--dataset", text_file, "--samples", 8, "--seq-len", 60, "--work", work)
    a3("solve", "--mlp-budget", 0.4, "--components", "mlp", "--mlp-multiple", 8, "--work", work)
    assert a3("export", out, "--work", work).code == 0
    blocks = load_file(work / "calibration" / "tokens.safetensors")["tokens"]
    solution = load_file(work / "solution" / "layer-000.safetensors")
    seen = []
    full = load(source)
    down = mlp_linears(full.model.layers[0])["down"]
    down.register_forward_hook(lambda _m, args, output: seen.extend([args[0], output]))
    full(blocks)
    x, target = (part.flatten(0, 1).double() for part in seen)
    kept = torch.cat([x[:, solution["channels"]], torch.ones(len(x), 1)], 1)
    expected = torch.linalg.lstsq(kept, target).solution
    found = mlp_linears(load(out).model.layers[0])["down"]
    torch.testing.assert_close(found.weight.double(), expected[:-1].mT, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.bias.double(), expected[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-gqa-bias", "starcoder2-gqa", "starcoder2-window"])
@torch.no_grad()
def test_predicted_mlp_loss_is_the_measured_one(name, a3, checkpoint, text_file, tmp_path):
    """Compare the first layer's MLP output in source and export; nothing else was cut."""
    source, work, out = checkpoint(name), tmp_path / "work", tmp_path / "out"
    a3("calibrate", source, "--dataset", text_file, "--samples", 8, "--seq-len", 60, "--work", work)
    cut = ("--mlp-budget", 0.8, "--components", "mlp", "--mlp-multiple", 8, "--sensitivity", "residual")
    solved = a3("solve", *cut, "--work", work, "--json").json
    assert a3("export", out, "--work", work).code == 0
    blocks, put_out = load_file(work / "calibration" / "tokens.safetensors")["tokens"], []
    for folder in (source, out):
        model = load(folder)
        model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: put_out.append(output.double()))
        model(blocks)
    stored = load_file(work / "calibration" / "layer-000.safetensors")
    measured = (put_out[1] - put_out[0]).square().sum() * stored["mlp_inverse"] / stored["tokens"] ** 2
    curve = solved["per_layer"][0]["curves"]["mlp"]
    predicted = curve["loss"][curve["size"].index(solved["sizes"][0]["mlp"])]
    assert predicted == pytest.approx(measured.item(), rel=1e-4)
    assert predicted > 1e-4


def test_a_few_long_streams_hide_no_loss(a3, checkpoint, text_file, tmp_path):
    """A token whose stream is a thousand times as long changes what is predicted by little more than its own share."""
    source, long = checkpoint("llama-gqa"), tmp_path / "long"
    shutil.copytree(source, long)
    work, predicted = tmp_path / "work", []
    text = ("--dataset", text_file, "--samples", 8, "--seq-len", 60)
    assert a3("calibrate", source, *text, "--work", work).code == 0
    tokens = load_file(work / "calibration" / "tokens.safetensors")["tokens"].flatten().bincount()
    rare = int(tokens.masked_fill(tokens < 8, len(text_file.read_bytes())).argmin())
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"][rare] *= 1000
    save_file(weights, long / "model.safetensors", metadata={"format": "pt"})
    for folder in (source, long):
        if folder == long:
            assert a3("calibrate", folder, *text, "--work", work, "--overwrite").code == 0
        solved = a3(*SOLVE, "--work", work, "--overwrite", "--json").json
        predicted.append(
            torch.tensor([layer["curves"][c]["loss"][0] for layer in solved["per_layer"] for c in ("qk", "ov", "mlp")])
        )
    assert (predicted[0] > 1e-4).all()
    torch.testing.assert_close(predicted[1], predicted[0], rtol=0.2, atol=0)


def test_attention_only_leaves_the_mlp_bit_identical(a3, checkpoint, text_file, tmp_path):
    source = checkpoint("llama-gqa")
    out = run_chain(a3, source, text_file, tmp_path, "--budget", 0.1, "--components", "qk,ov", "--head-multiple", 2)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, source))
    changed = {key.split(".")[-2] for key in theirs if ours[key].shape != theirs[key].shape}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key.split(".")[-2] not in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources_are_rounded_once(dtype, a3, checkpoint, text_file, tmp_path):
    """Each exported weight is the rounded result of the same solution in float32."""
    source = checkpoint("llama-gqa", dtype=dtype)
    out = run_chain(a3, source, text_file, tmp_path, "--budget", 0.3, "--head-multiple", 2, "--mlp-multiple", 8)
    wide = tmp_path / "wide"
    assert a3("export", wide, "--work", tmp_path / "work", "--dtype", "float32").code == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, wide))
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    assert all(torch.equal(ours[key], theirs[key].to(dtype)) for key in theirs)
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"


def test_shards_in_and_out(a3, checkpoint, text_file, tmp_path):
    whole, sharded = checkpoint("llama-gqa-tied"), checkpoint("llama-gqa-tied", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    options = ("--budget", 0.25, "--head-multiple", 2, "--mlp-multiple", 8)
    plain = run_chain(a3, whole, text_file, tmp_path / "plain", *options)
    split = run_chain(a3, sharded, text_file, tmp_path / "split", *options, export_options=("--max-shard-size", "30KB"))
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert {path.name for path in split.glob("*.safetensors")} == set(index["weight_map"].values())
    assert "lm_head.weight" not in index["weight_map"]
    for shard in split.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert all(index["weight_map"][key] == shard.name for key in file.keys())  # noqa: SIM118
    assert torch.equal(logits(load(split)), logits(load(plain)))


def test_same_inputs_give_the_same_bytes(a3, checkpoint, text_file, tmp_path):
    source = checkpoint("llama-gqa")
    options = ("--budget", 0.25, "--head-multiple", 2, "--mlp-multiple", 8)
    outs = [run_chain(a3, source, text_file, tmp_path / name, *options) for name in ("one", "two")]
    files = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert files[0] == files[1]


def test_manifest_names_every_file_by_hash(a3, checkpoint, text_file, tmp_path):
    from a3cli.work.files import hash_file

    out = run_chain(a3, checkpoint("llama-gqa"), text_file, tmp_path, "--budget", 0.25, "--head-multiple", 2)
    manifest = json.loads((out / "a3_manifest.json").read_text())
    assert manifest["files"] == {p.name: hash_file(p) for p in out.iterdir() if p.name != "a3_manifest.json"}


def test_everything_beside_the_weights_is_carried_over(a3, checkpoint, text_file, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama-gqa"), source)
    (source / "LICENSE").write_text("do as you like\n")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A model\n")
    (source / "train.py").write_text("print('not carried')\n")
    out = run_chain(a3, source, text_file, tmp_path, "--budget", 0.25, "--mlp-multiple", 8)
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "train.py").exists()
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "25 %" in card
    assert str(tmp_path) not in card


def test_reached_budget_overshoots_only_by_rounding(a3, checkpoint, text_file, tmp_path):
    source, work = checkpoint("llama-gqa"), tmp_path / "work"
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 4, "--seq-len", 64, "--work", work).code == 0
    total = 2 * (2 * 6 * 16 * 48 + 3 * 96 * 48)
    for budget in (0.0, 0.1, 0.25, 0.4, 0.55):
        solved = a3(
            "solve",
            "--budget",
            budget,
            "--work",
            work,
            "--head-multiple",
            4,
            "--mlp-multiple",
            8,
            "--overwrite",
            "--json",
        ).json
        reached = solved["budget_reached"]
        out = tmp_path / f"out{budget}"
        assert a3("export", out, "--work", work).code == 0
        weights = load_file(out / "model.safetensors")
        kept = sum(t.numel() for key, t in weights.items() if key.split(".")[-2] in LINEAR_NAMES)
        assert reached == pytest.approx(1 - kept / total)
        assert budget <= reached <= budget + 8 * 3 * 48 * 2 / total
        assert solved["parameters"]["after"] == sum(t.numel() for t in weights.values())
        assert solved["bytes"]["after"] == sum(t.nbytes for t in weights.values())


def test_a_finished_stage_run_again_is_a_no_op(a3, checkpoint, text_file, tmp_path):
    source, work = checkpoint("llama-gqa"), tmp_path / "work"
    commands = [
        ("calibrate", source, "--dataset", text_file, "--samples", 4, "--seq-len", 64, "--json"),
        ("solve", "--budget", 0.25, "--mlp-multiple", 8, "--json"),
    ]
    for command in commands:
        first = a3(*command, "--work", work)
        before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.name != ".lock"}
        again = a3(*command, "--work", work)
        assert again.json == first.json
        assert {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.name != ".lock"} == before
    export = ("export", tmp_path / "out", "--work", work, "--json")
    first = a3(*export)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert a3(*export).json == first.json
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == written
    other = a3(*export, "--dtype", "bfloat16")
    assert (other.code, "not empty" in other.stderr) == (2, True)
    assert a3("solve", "--budget", 0.3, "--work", work).code == 2
    assert a3("solve", "--budget", 0.3, "--mlp-multiple", 8, "--work", work, "--overwrite").code == 0
    other = a3(*export)
    assert (other.code, "not empty" in other.stderr) == (2, True)


def test_weights_that_an_export_could_not_stand_for_are_refused(a3, checkpoint, text_file, tmp_path):
    """They overflow the requested dtype, or are not finite where calibration does not check. Nothing is left behind."""
    source = Path(shutil.copytree(checkpoint("llama-gqa"), tmp_path / "source"))
    work, out, file = tmp_path / "work", tmp_path / "out", source / "model.safetensors"
    weights = load_file(file)

    def edit(name: str, value: float) -> None:
        changed = weights[name].clone()
        changed.view(-1)[0] = value
        save_file({**weights, name: changed}, file, {"format": "pt"})

    for name, value, dtype, said in (
        ("model.embed_tokens.weight", 1e5, "float16", "too large for torch.float16"),
        ("model.layers.1.mlp.up_proj.weight", 1e5, "float16", "too large for torch.float16"),
        ("lm_head.weight", float("nan"), "source", "NaN or Inf"),
    ):
        edit(name, value)
        text = ("--dataset", text_file, "--samples", 4, "--seq-len", 64)
        assert a3("calibrate", source, *text, "--work", work, "--overwrite").code == 0
        budgets = ("--attention-budget", 0.25, "--mlp-budget", 0, "--head-multiple", 8, "--sensitivity", "residual")
        assert a3("solve", *budgets, "--work", work).code == 0
        outcome = a3("export", out, "--dtype", dtype, "--work", work)
        assert outcome.code == 2
        assert name in outcome.stderr
        assert said in outcome.stderr
        assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("method", ["paper", "best"])
@pytest.mark.parametrize("sequential", [False, True])
def test_disk_that_a_solution_takes_is_what_was_asked_for(method, sequential, a3, checkpoint, text_file, tmp_path):
    """The space requested at the start is the tensors' size; a sequential solution keeps at most half of it."""
    source, work = checkpoint("llama-gqa"), tmp_path / "work"
    asked: list[int] = []
    text = ("--dataset", text_file, "--samples", 4, "--seq-len", 64)
    assert a3("calibrate", source, *text, "--work", work).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("a3cli.work.draft.Draft.check_space", lambda _self, needed, what: asked.append(needed))
        options = ("--sequential",) if sequential else ()
        budgets, multiples = (
            ("--attention-budget", 0.25, "--mlp-budget", 0.25),
            ("--head-multiple", 8, "--mlp-multiple", 8),
        )
        assert a3("solve", *budgets, *multiples, "--method", method, *options, "--work", work).code == 0
    tensors = [load_file(path) for path in (work / "solution").glob("layer-*.safetensors")]
    stored = sum(tensor.nbytes for each in tensors for tensor in each.values())
    assert len(asked) == 1
    assert asked[0] >= 2 * stored if sequential else asked[0] == stored


def test_tokenizer_of_the_fixtures_round_trips():
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer("héllo\n  x")["input_ids"]) == "héllo\n  x"


@pytest.mark.parametrize("method", ["paper", "best"])
def test_no_size_is_below_the_least(method, a3, checkpoint, text_file, tmp_path):
    source, work = checkpoint("llama-gqa"), ("--work", tmp_path / "work")
    assert a3("calibrate", source, "--dataset", text_file, "--samples", 4, "--seq-len", 64, *work).code == 0
    common = ("solve", "--method", method, "--shape", "per-layer", "--head-multiple", 2, "--mlp-multiple", 8)
    floors = ("--min-head", 9, "--min-mlp", 50)
    free, held = (
        a3(*common, "--budget", 0.35, *options, "--overwrite", "--json", *work).json["sizes"]
        for options in ((), floors)
    )
    assert any(min(layer["qk"], layer["ov"]) < 10 or layer["mlp"] < 56 for layer in free)
    assert all(min(layer["qk"], layer["ov"]) >= 10 and layer["mlp"] >= 56 for layer in held)
    refused = a3(*common, "--budget", 0.5, *floors, "--overwrite", *work)
    assert refused.code == 2
    assert "cannot be reached" in refused.stderr
    assert "--min-mlp" in refused.stderr


# This configuration takes the scaling from the model's context.
YARN_BY_CONTEXT = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
LONGROPE_BY_CONTEXT = {key: value for key, value in LONGROPE.items() if key != "factor"}
ROPES = (DEFAULT, LINEAR, LLAMA3, YARN, YARN_BY_CONTEXT, LONGROPE, LONGROPE_BY_CONTEXT)


@pytest.mark.parametrize("shape", ["stock", "per-layer"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: f"{rope['rope_type']}-{len(rope)}")
def test_a_lower_context_changes_nothing_within_it(rope, shape, a3, checkpoint, text_file, tmp_path):
    source = checkpoint("llama-gqa", rope_parameters=rope)
    out = run_chain(a3, source, text_file, tmp_path, "--budget", 0, "--shape", shape, "--context", 128)
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 128
    torch.testing.assert_close(logits(load(out, trust_remote_code=True)), logits(load(source)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["theta", "linear", "longrope"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-linear", "nemotron-gqa", "llama-llama3", "granite-gqa"])
def test_rope_has_the_form_that_was_asked_for(form, name, a3, checkpoint, text_file, tmp_path):
    """Evenly spaced slots are part of the solution, so the export is exact, and the predictions include them."""
    options = ("--attention-budget", 0.25, "--components", "qk,ov", "--head-multiple", 2, "--rope-form", form)
    out = run_chain(a3, checkpoint(name), text_file, tmp_path, *options)
    config, slots = (json.loads((out / name).read_text()) for name in ("config.json", "a3_manifest.json"))
    slots = [slot for slot in slots["solution"]["rope_slots"] if slot < turning_pairs_of(name)]
    rope = config["rope_parameters"]
    if form == "longrope":
        assert rope["rope_type"] == "longrope" or slots == [*range(len(slots))]
    else:
        assert torch.tensor(slots, dtype=torch.float64).diff().diff().abs().max() < 1e-9
        assert rope["rope_type"] != "longrope"
    if form == "theta":
        assert slots[0] == 0
        assert rope.get("factor") == (checkpoint_rope(checkpoint(name)).get("factor"))
    verified = a3("verify", out, "--work", tmp_path / "work", "--quiet")
    assert verified.code == 0, verified


def turning_pairs_of(name: str) -> int:
    return 4 if name.startswith("nemotron") else 8


def checkpoint_rope(source: Path) -> dict:
    return json.loads((source / "config.json").read_text())["rope_parameters"]


@pytest.mark.parametrize("options", [("--method", "paper"), ("--shape", "per-layer")])
def test_rope_form_is_for_slots_of_the_stock_shape(options, a3, work):
    refused(a3("solve", "--budget", 0.2, "--rope-form", "theta", *options, "--work", work), "--rope-form theta needs")


@pytest.mark.parametrize("rope", [YARN, LONGROPE], ids=lambda rope: rope["rope_type"])
def test_rope_that_no_theta_expresses_is_refused(rope, a3, checkpoint, text_file, tmp_path):
    source, place = checkpoint("llama-gqa", rope_parameters=rope), ("--work", tmp_path / "work")
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, *place).code == 0
    refused(a3("solve", "--budget", 0.2, "--rope-form", "theta", *place), rope["rope_type"], "--rope-form auto")


@pytest.mark.parametrize("allowed", [0.0, 1e3])
def test_evenly_spaced_slots_are_taken_if_they_cost_little(allowed, a3, checkpoint, text_file, tmp_path, monkeypatch):
    """A changed theta loads in more runtimes than longrope factors."""
    monkeypatch.setattr("a3cli.methods.slots.AFFINE_COST", allowed)
    options = ("--attention-budget", 0.25, "--components", "qk,ov", "--head-multiple", 2)
    out = run_chain(a3, checkpoint("llama-gqa"), text_file, tmp_path, *options)
    config = json.loads((out / "config.json").read_text())
    assert config["head_dim"] == 12
    assert config["rope_parameters"]["rope_type"] in (("default", "linear") if allowed else ("longrope",))
    verified = a3("verify", out, "--work", tmp_path / "work", "--quiet")
    assert verified.code == 0, verified
