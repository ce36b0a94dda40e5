"""The per-layer shape: random solutions with different sizes in each layer, exported and loaded with their own code.

The reference is the source with attention and MLP written out in complex float64 arithmetic, independently of both
the package and transformers.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from a3cli.models import costs
from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import LayerSizes, usual_entries
from a3cli.models.model import describe
from a3cli.settings import ExportSettings, SolveSettings, TextSettings
from a3cli.stages.export import export
from a3cli.work.files import Json, hash_file, write_tensors
from a3cli.work.folder import Work
from a3cli.work.sealed import versions, write_manifest
from tests.conftest import (
    MODELS,
    VOCABULARY,
    as_slots,
    attention_of,
    build_model,
    build_tokenizer,
    can_cut,
    carries_attention,
    decoder_layers,
    family_of_row,
    gain_of,
    head_linears,
    mlp_width,
    output_linear,
)
from tests.helpers.experts import each_down
from tests.helpers.solutions import random_solution

pytestmark = pytest.mark.usefixtures("hasty")

LENGTH = 120  # beyond the longrope source's original context
# Three layers: all smaller with QK < OV; full QK and MLP with OV < QK; only QK smaller.
SIZES = [LayerSizes(10, 14, 64), LayerSizes(16, 6, 96), LayerSizes(6, 16, 96)]
WHOLE = [float(pair) for pair in range(8)]
SLOTS = [[0.0, 1.3, 2.5, 4.0, 6.8], WHOLE, [0.0, 2.0, 6.7]]  # bfloat16 cannot represent 1.3
NO_SLOTS: list[list[float]] = [[]] * 3  # without RoPE
FULL = [LayerSizes(16, 16, 96)] * 3


NO_HASH = "blake3:" + 64 * "0"
CURVE = {"size": [1], "loss": [0.0]}
LAYER = {  # figures that export only copies
    "effective_rank": {"qk": [1.0], "ov": [1.0], "mlp": 1.0},
    "floored_eigenvalues": {"ov": [0]},
    "energy": {"qk": 1.0, "ov": 1.0, "mlp": 1.0},
    "attention_error": None,
    "damping": {},
    "curves": {"qk": CURVE, "ov": CURVE, "mlp": CURVE},
    "score_error": {"distance": [0], "relative": [0.0]},
    "tokens_per_dimension": {"head": 1.0, "mlp": 1.0},
}


def make_work(folder: Path, source: Path, sizes: list[LayerSizes], slots: list[list[float]], solutions: list) -> Work:
    """Write a work folder as calibrate and solve leave it, with the parts that export reads."""
    work = Work(folder)
    work.calibration.mkdir(parents=True)
    work.solution.mkdir()
    checkpoint = Checkpoint(source)
    shape, item = describe(checkpoint).shape, checkpoint.dtype.itemsize
    machine = {"batch_size": 1, "mlp_stats": "full", "device": "cpu", "dtype": "float32", "trust_remote_code": False}
    text = {"text": TextSettings(dataset="by-hand", seq_len=32).model_dump(), "text_files": {}, "tokenizer": {}}
    request = {"source": checkpoint.fingerprint(), **text, **machine}
    small_files = checkpoint.hash_small_files()
    where = {"model": str(source), "revision": None, "fingerprint": checkpoint.fingerprint()}
    write_manifest(work.source, {**where, "small_files": small_files})
    calibration = write_manifest(
        work.calibration_manifest,
        {
            "request": request,
            "text_read": None,
            "tokens": 8,
            "blocks": [2, 4],
            "tokens_hash": NO_HASH,
            "layers": [NO_HASH],
            "versions": versions(),
        },
    )
    for layer, solution in enumerate(solutions):
        write_tensors(work.layer_solution(layer), solution)
    before, kept = costs.linear_weights(shape, shape.sizes), costs.linear_weights(shape, sizes)
    write_manifest(
        work.solution_manifest,
        {
            "request": {
                "settings": SolveSettings(budget=0.3).model_dump(mode="json"),
                "calibration": calibration["sha256"],
            },
            "shape": "per-layer",
            "full_size": asdict(shape.full_sizes),
            "sizes": [asdict(size) for size in sizes],
            "rope_slots": slots if slots[0] else None,
            "context": usual_entries(checkpoint.config)["max_position_embeddings"],
            "predicted_loss": {"qk": 0.0, "ov": 0.0, "mlp": 0.0},
            "budget_asked": 0.3,
            "budget_reached": (before - kept) / before,
            "parameters": {
                "before": checkpoint.parameters(),
                "after": checkpoint.parameters() - costs.removed_parameters(shape, sizes),
            },
            "bytes": {"before": checkpoint.bytes(), "after": checkpoint.bytes()},
            "kv_bytes_per_token": {
                "before": costs.kv_bytes_per_token(shape, shape.sizes, item),
                "after": costs.kv_bytes_per_token(shape, sizes, item),
            },
            "predicted_score_error": {"distance": [0], "relative": [0.0]},
            "prefill_flops_per_token": {
                "seq_len": 4,
                "before": costs.prefill_flops_per_token(shape, shape.sizes, 4),
                "after": costs.prefill_flops_per_token(shape, sizes, 4),
            },
            "per_layer": [LAYER] * len(sizes),
            "layers": [hash_file(work.layer_solution(layer)) for layer in range(len(solutions))],
            "versions": versions(),
        },
    )
    return work


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def exported(folder: Path, source: Path, sizes: list, slots: list, solutions: list, **settings: Any) -> Path:
    """Export the solutions and return the folder; the work folder is `folder/work`."""
    work = make_work(folder / "work", source, sizes, slots, solutions)
    export(folder / "out", ExportSettings(**settings), work)
    return folder / "out"


def random_export(name: str, folder: Path, *, method: str = "best", seed: int = 3, **settings: Any) -> Path:
    model = build_model(name, num_hidden_layers=3)
    source, width = save(model, folder / "source"), model.config.hidden_size
    torch.manual_seed(seed)
    whole = {part: 16 for part in ("qk", "ov") if not can_cut(name, part, shape="per-layer")}
    sizes = [replace(size, mlp=mlp_width(name) if size.mlp == 96 else size.mlp, **whole) for size in SIZES]
    slots = [own if size.qk < 16 else WHOLE for own, size in zip(SLOTS, sizes, strict=True)]
    slots = slots if has_slots(name) else NO_SLOTS
    slots = slots if method == "best" else [[float(int(slot)) for slot in layer] for layer in slots]
    solutions = [random_solution(name, *layer, method=method, width=width) for layer in zip(sizes, slots, strict=True)]
    return exported(folder, source, sizes, slots, solutions, **settings)


def has_slots(name: str) -> bool:
    """Return whether the layers of a model of the table have RoPE that an export may change."""
    return family_of_row(name).rotates and not family_of_row(name).carried_attention


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Return a per-layer export of a model with every bias. Don't write to the folder."""
    return random_export("llama-gqa-bias", tmp_path_factory.mktemp("small"))


def load(folder: Path, **options: Any) -> Any:
    """Load a folder with its own code; check that no weight is unused or missing."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=options.pop("dtype", torch.float32),
        trust_remote_code=options.pop("trust_remote_code", True),
        output_loading_info=True,
        **options,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def tokens(length: int = LENGTH, batch: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY - 3, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def logits(model: Any, length: int = LENGTH) -> torch.Tensor:
    return model(tokens(length)).logits


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


class LiteralAttention(torch.nn.Module):
    """One layer's attention, head by head; each slot is a complex number that RoPE rotates.

    Without RoPE, slots are pairs of dims that are not rotated.
    """

    def __init__(
        self, stock: Any, rotary: Any | None, solution: dict[str, torch.Tensor], slots: list[float] | None
    ) -> None:
        super().__init__()
        self.stock, self.solution = stock, solution
        self.slots = [0.0] * (solution.get("key_map", torch.empty(16)).shape[-1] // 2) if slots is None else slots
        self.inv_freq, self.factor = (
            ([], 1.0) if rotary is None else (rotary.inv_freq.tolist(), rotary.attention_scaling)
        )

    def frequency(self, slot: float) -> float:
        low, share = int(slot), slot % 1
        if slot >= len(self.inv_freq):  # unrotated
            return 0.0
        return self.inv_freq[low] if share == 0 else self.inv_freq[low] ** (1 - share) * self.inv_freq[low + 1] ** share

    def slots_of(self, x: torch.Tensor, name: str, kv_head: int) -> torch.Tensor:
        """Convert `[T, 16]` to complex `[T, slots]`, before rotation."""
        if "pairs" in self.solution:
            return as_slots(x, len(self.inv_freq))[:, self.solution["pairs"]]
        mixed = x @ self.solution[f"{name}_map"][kv_head] if f"{name}_map" in self.solution else x
        return as_slots(mixed, sum(slot < len(self.inv_freq) for slot in self.slots))

    def normed(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return heads `[T, n, 16]`, each or all of a token with a root mean square of 1, times the weight."""
        flat = heads if len(weight) == 16 else heads.flatten(1)
        found = flat / (flat.square().mean(-1, keepdim=True) + self.stock.config.rms_norm_eps).sqrt() * weight
        return found.view(heads.shape)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.stack([self.one(row) for row in hidden_states]), None

    def one(self, row: torch.Tensor) -> torch.Tensor:
        stock, length, heads = self.stock, len(row), 4
        group = getattr(stock, "num_key_value_groups", 1)
        time = torch.arange(length)
        angles = time[:, None].double() * torch.tensor([self.frequency(s) for s in self.slots], dtype=torch.float64)
        scaled = [self.factor if slot < len(self.inv_freq) else 1.0 for slot in self.slots]
        turn = torch.polar(torch.tensor(scaled, dtype=torch.float64).expand_as(angles), angles)
        if not getattr(stock, "use_rope", True):
            turn = torch.ones_like(turn)
        config = getattr(stock, "config", None)  # MPT's attention keeps none
        scale = getattr(config, "attention_multiplier", getattr(config, "query_pre_attn_scalar", 16) ** -0.5)
        parameters = getattr(config, "rope_parameters", None) or {}
        growth, context = (
            parameters.get("llama_4_scaling_beta", 0.0),
            parameters.get("original_max_position_embeddings", 1),
        )
        grown = 1 + growth * (1 + time.div(context, rounding_mode="floor")).double().log()[:, None]
        seen = time[:, None] >= time
        # In model types whose layers have different windows, each layer stores its own.
        if window := getattr(stock, "sliding_window", getattr(config, "sliding_window", None)):
            seen &= time[:, None] - time < window
        q, k, v = (linear(row)[:, part].reshape(length, -1, 16) for linear, part in head_linears(stock).values())
        if hasattr(stock, "q_norm"):
            q, k = self.normed(q, gain_of(stock.q_norm)), self.normed(k, gain_of(stock.k_norm))
        output, weights = output_linear(stock)
        width = len(weights)
        wide = weights.reshape(width, heads, 16)
        out = torch.zeros(length, width, dtype=torch.float64)
        for i in range(heads):
            kv = i // group
            query, key = self.slots_of(q[:, i], "query", kv) * turn, self.slots_of(k[:, kv], "key", kv) * turn
            scores = (query @ key.conj().T).real * scale * grown
            if cap := getattr(stock, "attn_logit_softcapping", None):
                scores = cap * (scores / cap).tanh()
            if hasattr(stock, "Wqkv"):  # ALiBi with a largest bias of 8
                scores = scores - 2.0 ** (-8 * (i + 1) / heads) * (time[:, None] - time)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            value, weight = v[:, kv], wide[:, i]
            if "value_map" in self.solution:
                value = value @ self.solution["value_map"][kv]
                if "output_map" in self.solution:
                    weight = weight @ self.solution["output_map"][kv].T
                else:
                    weight = self.solution["output_weight"].double().view(width, heads, -1)[:, i]
            out += weights @ value @ weight.T
        return out if output.bias is None else out + output.bias


def rotary_of(model: Any, layer: int) -> Any:
    """Return what has the frequencies and the scaling of one layer's RoPE."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return None
    if hasattr(rotary, "layer_types"):
        kind = model.config.layer_types[layer]
        names = ("inv_freq", "attention_scaling")
        return SimpleNamespace(**{name: getattr(rotary, f"{kind}_{name}") for name in names})
    rotary(torch.zeros(1), torch.arange(LENGTH)[None])  # longrope chooses the table for this length
    return rotary


@torch.no_grad()
def literal_logits(folder: Path) -> torch.Tensor:
    """Return the expected logits of the source in `folder` with the solution in `folder/work`, in float64."""
    # Other kernels for experts have no float64; models without experts ignore this.
    kernels: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder / "source", **kernels).eval()
    rotaries = [rotary_of(model, index) for index in range(3)]
    slots = json.loads((folder / "work" / "solution" / "manifest.json").read_text())["rope_slots"]
    for index, layer in enumerate(decoder_layers(model)):
        solution = load_file(folder / "work" / "solution" / f"layer-{index:03d}.safetensors")
        if not carries_attention(model):
            attention = attention_of(layer)
            own = "self_attn" if hasattr(layer, "self_attn") else "attn"
            setattr(layer, own, LiteralAttention(attention, rotaries[index], solution, slots and slots[index]))
        if "channels" in solution:
            refits = [solution["down_weight"]] if "down_weight" in solution else []
            for weight, channels, *refit in each_down(layer, solution["channels"], *refits):
                kept = refit[0] if refit else weight[:, channels].clone()
                weight.zero_()[:, channels] = kept
    return logits(model.double())


@pytest.mark.parametrize("method", ["best", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_export_equals_the_literal_reference(name, method, tmp_path):
    model = load(random_export(name, tmp_path, method=method))
    expected = literal_logits(tmp_path)
    assert distance(logits(model), expected) < 2e-5
    # A solution without effect would pass the line above.
    assert distance(logits(load(tmp_path / "source", trust_remote_code=False)), expected) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_full_sizes_are_bit_for_bit_the_source(name, tmp_path):
    source = save(build_model(name, num_hidden_layers=3), tmp_path / "source")
    slots = [WHOLE] * 3 if has_slots(name) else NO_SLOTS
    full = [LayerSizes(16, 16, mlp_width(name))] * 3
    out = exported(tmp_path, source, full, slots, [{"unchanged": torch.zeros(0)}] * 3)
    for length in (LENGTH, 40):  # below and above the longrope source's switch
        assert torch.equal(logits(load(out), length), logits(load(source, trust_remote_code=False), length))


def test_training_drops_what_the_source_drops(tmp_path):
    model = build_model("starcoder2-gqa", num_hidden_layers=3, residual_dropout=0.2, embedding_dropout=0.2)
    source = save(model, tmp_path / "source")
    out = exported(tmp_path, source, FULL, [WHOLE] * 3, [{"unchanged": torch.zeros(0)}] * 3)
    models = load(out).train(), load(source, trust_remote_code=False).train()
    found = []
    for each in models:
        torch.manual_seed(5)
        found.append(logits(each))
    assert torch.equal(*found)
    assert not torch.equal(found[0], logits(models[0].eval()))


@torch.no_grad()
def test_what_is_zero_can_be_dropped_exactly(tmp_path):
    """A source whose zero pairs, value dims and channels differ by layer loses nothing."""
    model = build_model("llama-gqa", num_hidden_layers=3)
    solutions, slots = [], []
    for layer, size in zip(model.model.layers, SIZES, strict=True):
        pairs, dims = torch.randperm(8)[: size.qk // 2].sort().values, torch.randperm(16)[: size.ov]
        channels = torch.randperm(96)[: size.mlp].sort().values
        kept = {"q_proj": torch.cat([pairs, pairs + 8]), "k_proj": torch.cat([pairs, pairs + 8]), "v_proj": dims}
        for module, rows in kept.items():
            heads = getattr(layer.self_attn, module).weight.view(-1, 16, 48)
            heads[:, [row for row in range(16) if row not in rows]] = 0
        layer.mlp.down_proj.weight[:, [channel for channel in range(96) if channel not in channels]] = 0
        choice = torch.eye(16, dtype=torch.float64)[:, dims].expand(2, 16, -1).contiguous()
        solution = {"value_map": choice, "output_map": choice.mT.contiguous(), "channels": channels}
        solutions.append(solution | ({"pairs": pairs} if size.qk < 16 else {}))
        slots.append(pairs.double().tolist())
    source = save(model, tmp_path / "source")
    out = exported(tmp_path, source, SIZES, slots, solutions)
    assert distance(logits(load(out)), logits(load(source, trust_remote_code=False))) < 1e-6


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name",
    [
        "llama-gqa-bias",
        "llama-longrope",
        "mistral-gqa",
        "qwen2-window",
        "starcoder2-window",
        "nemotron-gqa",
        "qwen3-window",
        "smollm3-window",
        "qwen3_5-hybrid",
        "gemma3-gqa",
        "phi3-window",
        "phi3-longrope",
        "ministral3-gqa",
    ],
)
def test_generation_with_cache_equals_generation_without(name, implementation, tmp_path):
    assert_same_with_cache(load(random_export(name, tmp_path), attn_implementation=implementation))


@pytest.mark.parametrize("name", ["gpt2-mha", "mpt-mha", "opt-mha"])
def test_generation_without_rope_is_the_same_with_cache(name, tmp_path):
    """With the attention that transformers chooses: MPT has but one."""
    model = load(random_export(name, tmp_path))
    assert_same_with_cache(model)
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), tokens(40)], 1)
    mask = (torch.arange(47) >= 7).long().expand(2, -1)
    with torch.inference_mode():
        shifted = model(padded, attention_mask=mask, **positions_for(model, mask)).logits[:, 7:]
    torch.testing.assert_close(shifted, logits(model, 40), rtol=1e-4, atol=1e-4)


def positions_for(model: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return how generation gives GPT-2 the places of padded tokens; OPT counts by the mask, MPT from the end."""
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if model.config.model_type == "gpt2" else {}


def assert_same_with_cache(model: Any) -> None:
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    # Longer than Mistral's window, but not across the longrope switch: cached keys would come from the other table.
    prompt = {"input_ids": tokens(40), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    cached, plain = (model.generate(**prompt, use_cache=use, **options) for use in (True, False))
    assert cached.tolist() == plain.tolist()


def call_attention(model: Any, length: int, **more: Any) -> torch.Tensor:
    """Return the first layer's attention output for some hidden states at the first positions."""
    hidden = torch.randn(1, length, 48, generator=torch.Generator().manual_seed(3))
    embeddings = model.model.rotary_emb(hidden, torch.arange(length)[None])
    with torch.inference_mode():
        return model.model.layers[0].self_attn(hidden_states=hidden, position_embeddings=embeddings, **more)[0]


@pytest.mark.parametrize("name", ["past_key_values", "cache", "what_a_later_version_may_call_it"])
def test_attention_finds_its_cache_under_any_name(name, small):
    model, cache = load(small), DynamicCache()
    call_attention(model, 5, use_cache=True, **{name: cache})
    call_attention(model, 2, use_cache=True, attention_mask=torch.zeros(1, 1, 2, 7), **{name: cache})
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("more", [{"use_cache": True}, {"attention_mask": torch.zeros(1, 1, 2, 7)}])
def test_attention_stops_where_a_cache_is_in_use_and_none_arrives(more, small):
    model = load(small)
    with pytest.raises(RuntimeError, match="received no KV cache"):
        call_attention(model, 2, **more)
    call_attention(model, 2, use_cache=False, attention_mask=torch.zeros(1, 1, 2, 2))


def test_generation_stops_where_the_cache_does_not_reach_attention(small, monkeypatch):
    """This could happen after a renaming: it must not generate tokens as if nothing preceded them."""
    model = load(small)
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def without_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{key: kwargs[key] for key in kwargs if not isinstance(kwargs[key], Cache)})

    monkeypatch.setattr(attention, "forward", without_cache)
    with pytest.raises(RuntimeError, match="received no KV cache"):
        model.generate(tokens(8), max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.generate(tokens(8), max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)


def test_vllm_is_given_heads_of_the_full_size(small, monkeypatch):
    """vLLM's attention is called with heads of config.head_dim and returns a token's heads in one dimension."""
    fused = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def kernel(module: Any, *heads: torch.Tensor, **options: Any) -> Any:
        assert [part.shape[-1] for part in heads[:3]] == [16] * 3
        output, weights = fused(module, *heads, **options)
        return output.flatten(-2), weights

    model = load(small)
    expected = call_attention(model, 6)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", kernel)
    model.model.layers[0].self_attn.config._attn_implementation = "vllm"
    assert distance(call_attention(model, 6), expected) < 1e-6


@torch.inference_mode()
def test_the_decoder_loads_alone(small):
    """vLLM's Transformers backend builds it from `auto_map`."""
    decoder = AutoModel.from_pretrained(small, dtype=torch.float32, trust_remote_code=True).eval()
    whole = load(small)
    assert type(decoder).__name__ == "A3LlamaModel"
    assert torch.equal(decoder(tokens()).last_hidden_state, whole.model(tokens()).last_hidden_state)


def test_attention_kernels_agree_and_can_be_switched(small):
    model = load(small)
    fused = logits(model)
    model.set_attn_implementation("eager")
    assert distance(logits(model), fused) < 1e-6
    with torch.inference_mode():
        outputs = model(tokens(), output_attentions=True, output_hidden_states=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, LENGTH, LENGTH)] * 3
    assert len(outputs.hidden_states) == 4


def test_fused_kernels_are_given_heads_of_one_size(small, monkeypatch):
    """The test replaces kernels that cannot run here, such as flash attention."""
    fused, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def kernel(module: Any, *heads: torch.Tensor, **options: Any) -> Any:
        seen.append([part.shape[-1] for part in heads[:3]])
        assert options["scaling"] == 0.25
        return fused(module, *heads, **options)

    expected = logits(load(small))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", kernel)
    assert torch.equal(logits(load(small)), expected)
    assert seen == [[14, 14, 14], [16, 16, 16], [16, 16, 16]]


@torch.inference_mode()
def test_cache_holds_the_small_heads(small):
    outputs = load(small)(tokens(), use_cache=True)
    shapes = [(layer.keys.shape, layer.values.shape) for layer in outputs.past_key_values.layers]
    assert shapes == [((2, 2, LENGTH, size.qk), (2, 2, LENGTH, size.ov)) for size in SIZES]
    stored = sum(part.nbytes for layer in outputs.past_key_values.layers for part in (layer.keys, layer.values))
    manifest = json.loads((small / "a3_manifest.json").read_text())
    assert stored == 2 * LENGTH * manifest["solution"]["kv_bytes_per_token"]["after"]


@torch.inference_mode()
def test_static_cache_has_a_size_a_layer(small):
    model = load(small)
    prompt = {"input_ids": tokens(30), "attention_mask": torch.ones(2, 30, dtype=torch.long)}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cache = StaticCache(config=model.config, max_cache_len=40)
    fixed = model.generate(**prompt, past_key_values=cache, disable_compile=True, **options)
    assert fixed.tolist() == model.generate(**prompt, **options).tolist()
    assert [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers] == [(s.qk, s.ov) for s in SIZES]


@torch.inference_mode()
def test_left_padding_changes_nothing(small):
    model, text = load(small), tokens(30)
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), text], 1)
    mask = torch.cat([torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 30, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 7:]
    assert distance(shifted, model(text).logits) < 1e-5


@pytest.mark.parametrize("cast", ["after loading", "while loading"])
def test_bfloat16_does_not_touch_the_frequencies(cast, small):
    exact = load(small)
    model = load(small).to(torch.bfloat16) if cast == "after loading" else load(small, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    wide, positions = torch.zeros(1), torch.arange(0, 4096, 63)[None]
    for ours, theirs in zip(
        model.model.rotary_emb(wide, positions), exact.model.rotary_emb(wide, positions), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert distance(logits(model), logits(exact)) < 0.1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_every_weight_gets_a_gradient(small):
    model = load(small).train()
    model.gradient_checkpointing_enable()
    model(tokens(40), labels=tokens(40)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # The softmax ignores terms that are the same for all keys.
        assert parameter.grad.any() or name.endswith("k_proj.bias"), name


def test_saved_and_loaded_again(small, tmp_path):
    model = load(small)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].endswith("modeling_a3_llama.A3LlamaForCausalLM")
    for name in ("modeling_a3_base.py", "modeling_a3_llama.py"):
        assert (tmp_path / "again" / name).read_bytes() == (small / name).read_bytes()
    assert "allow_global_per_layer_attribute_access" not in config
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_config_is_read_by_transformers_itself(small):
    """It reads the sizes of each layer without our code; there is no common size where they differ."""
    config = AutoConfig.from_pretrained(small)
    assert type(config).__name__ == "LlamaConfig"
    found = [LayerSizes(own.qk_head_dim, own.v_head_dim, own.intermediate_size) for own in config.per_layer_config]
    assert found == SIZES
    assert [own.rope_slots for own in config.per_layer_config] == SLOTS
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.intermediate_size


def test_weights_have_the_planned_shapes_and_untouched_ones_their_bytes(small):
    ours, theirs = load_file(small / "model.safetensors"), load_file(small.parent / "source" / "model.safetensors")
    manifest = json.loads((small / "a3_manifest.json").read_text())["solution"]
    assert sum(tensor.numel() for tensor in ours.values()) == manifest["parameters"]["after"]
    for index, size in enumerate(SIZES):
        prefix = f"model.layers.{index}."
        assert ours[prefix + "self_attn.k_proj.bias"].shape == (2 * size.qk,)
        assert ours[prefix + "self_attn.o_proj.weight"].shape == (48, 4 * size.ov)
        assert ours[prefix + "mlp.down_proj.weight"].shape == (48, size.mlp)
    for kept in (
        "1.self_attn.q_proj",
        "1.mlp.gate_proj",
        "2.self_attn.v_proj",
        "2.self_attn.o_proj",
        "2.mlp.down_proj",
    ):
        assert torch.equal(ours[f"model.layers.{kept}.weight"], theirs[f"model.layers.{kept}.weight"]), kept


def test_card_and_manifest_say_how_to_load(small, capsys):
    from a3cli.cli.display import print_export
    from a3cli.report.manifest import read_export_manifest
    from a3cli.stages.publish import Exported

    card, manifest = (small / "README.md").read_text(), json.loads((small / "a3_manifest.json").read_text())
    assert "trust_remote_code=True" in card
    assert "6 to 16, mean 10.7" in card
    assert [name for name in manifest["files"] if name.endswith(".py")] == [
        "modeling_a3_base.py",
        "modeling_a3_llama.py",
    ]
    print_export(Exported(read_export_manifest(small / "a3_manifest.json")), str(small))
    assert "trust_remote_code=True" in capsys.readouterr().out
    assert {each["runtime"]: each["loads"] for each in manifest["runtimes"]}["llama.cpp"] == "no"


def keep_mlp(config: Json) -> None:
    """Keep the full MLP: attention alone differs by layer, so the MLP width no longer excludes a stock class."""
    for layer in config["per_layer_config"].values():
        layer["intermediate_size"] = config["intermediate_size"]


@pytest.mark.parametrize("change", [lambda config: None, keep_mlp])
def test_stock_classes_stop_with_an_error(change, small, tmp_path):
    with pytest.raises(RuntimeError, match=r"per-layer attribute|mismatch"):
        load(edit(small, tmp_path, change), trust_remote_code=False)


def edit(folder: Path, tmp_path: Path, change: Any) -> Path:
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    config: Json = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("per_layer_config"), "gives layer 0 no qk_head_dim"),
        (lambda config: config["per_layer_config"]["0"]["rope_slots"].pop(), "layer 0 needs 5 rope_slots"),
        (lambda config: config["per_layer_config"]["2"].update(rope_slots=[0, 1, 9]), "between 0 and 7"),
    ],
)
def test_a_damaged_config_says_so(change, message, small, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(edit(small, tmp_path, change))


def test_eval_runs_its_code_only_when_told(small, a3, text_file):
    options = ("eval", small, "--dataset", text_file, "--samples", 2, "--seq-len", 64, "--json")
    refused = a3(*options)
    assert refused.code == 2
    assert "--trust-remote-code" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    against = ("--against", small.parent / "source", "--trust-remote-code")
    assert a3(*options, *against).json["kl"] > 0


def test_an_export_is_not_compressed_again(small, a3, text_file, tmp_path):
    outcome = a3("calibrate", small, "--dataset", text_file, "--work", tmp_path / "work")
    assert outcome.code == 2
    assert "compress its source" in outcome.stderr


@pytest.mark.slow
@torch.inference_mode()
def test_compiles_in_one_graph(small):
    model = load(small)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(compiled(tokens(), use_cache=False).logits, logits(model)) < 1e-6
