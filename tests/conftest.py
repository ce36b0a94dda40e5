"""Fixtures: a table of tiny random models with text and a tokenizer, and the real CLI, run in-process."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MptConfig,
    MptForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from a3cli.models.families import FAMILIES, Family, family_for
from a3cli.settings import Component
from a3cli.work.files import hash_file, read_json
from a3cli.work.sealed import write_manifest
from tests.helpers.checkers import forked
from tests.helpers.hasty import make_hasty
from tests.helpers.long_tail import is_long_tail

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# How long an example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
VOCABULARY = 260
CONTEXT = 256
TEXT_LENGTH = 30_000  # characters, and about as many tokens
SHORT = ("--samples", 3, "--seq-len", 32)
SOLVE = ("solve", "--budget", 0.25, "--mlp-multiple", 8, "--head-multiple", 2)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * j for j in range(8)],
    "long_factor": [1.0 + 0.5 * j for j in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GROWING = YARN | {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
NO_ROPE = {"no_rope_layer_interval": 2, "pad_token_id": None}  # every second layer has no RoPE
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# Entries that configurations of models without RoPE do not have; heads of 16 dims, as in all models.
WITHOUT_ROPE = dict.fromkeys(("rope_parameters", "head_dim", "num_key_value_heads", "intermediate_size"), ...)
WITHOUT_ROPE |= {"hidden_size": 64}

# name → (config class, model class, differences from the common sizes)
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-gqa-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-gqa-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-mha-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "num_key_value_heads": 4}),
    "llama-linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR}),
    "llama-llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama-yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN}),
    "llama-longrope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LONGROPE}),
    "gemma2-gqa": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 6.0,
            "sliding_window": 24,  # in every second layer
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-gqa": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT | {"rope_theta": 1000.0}},
            "query_pre_attn_scalar": 24,
            "sliding_window": 24,
            "sliding_window_pattern": 2,  # every second layer has none
            "tie_word_embeddings": True,
        },
    ),
    "granite-gqa": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "mistral-gqa": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "mixtral-gqa": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "olmo2-gqa": (Olmo2Config, Olmo2ForCausalLM, {}),
    "ministral3-gqa": (Ministral3Config, Ministral3ForCausalLM, {"rope_parameters": GROWING, "pad_token_id": None}),
    "qwen2-gqa": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},  # from the second layer on
    ),
    "qwen3-gqa": (Qwen3Config, Qwen3ForCausalLM, {}),
    "qwen3_5-hybrid": (
        Qwen3_5TextConfig,
        Qwen3_5ForCausalLM,
        {
            "full_attention_interval": 2,  # every second layer; the others have linear attention
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        },
    ),
    "qwen3-bias": (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},  # from the second layer on
    ),
    "qwen3moe-gqa": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 80},
    ),
    "smollm3-bias": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        NO_ROPE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    ),
    "smollm3-window": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        NO_ROPE | {"use_sliding_window": True, "sliding_window": 24},  # where there is no RoPE
    ),
    "starcoder2-gqa": (Starcoder2Config, Starcoder2ForCausalLM, {}),
    "starcoder2-window": (
        Starcoder2Config,
        Starcoder2ForCausalLM,
        {"use_bias": False, "sliding_window": 24, "tie_word_embeddings": True},
    ),
    "nemotron-gqa": (NemotronConfig, NemotronForCausalLM, {"partial_rotary_factor": 0.5}),
    "nemotron-mha-bias": (
        NemotronConfig,
        NemotronForCausalLM,
        {
            "rope_parameters": LINEAR | {"partial_rotary_factor": 0.75},
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 4,
        },
    ),
    # The common sizes reach GPT-2's configuration under its own names.
    "gpt2-mha": (GPT2Config, GPT2LMHeadModel, WITHOUT_ROPE | {"n_inner": 96}),
    "mpt-mha": (MptConfig, MptForCausalLM, WITHOUT_ROPE | {"max_position_embeddings": ..., "max_seq_len": CONTEXT}),
    "opt-mha": (OPTConfig, OPTForCausalLM, WITHOUT_ROPE | {"ffn_dim": 96, "pad_token_id": 1}),
    "phi3-window": (Phi3Config, Phi3ForCausalLM, {"sliding_window": 24, "pad_token_id": None}),
    "phi3-partial": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "rope_parameters": DEFAULT | {"partial_rotary_factor": 0.75},
            "pad_token_id": None,
            "tie_word_embeddings": True,
        },
    ),
    "phi3-mini4": (  # as Phi-4-mini: heads of which a part is rotated and scaled
        Phi3Config,
        Phi3ForCausalLM,
        {
            "hidden_size": 64,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": LONGROPE["short_factor"][:6],
                "long_factor": LONGROPE["long_factor"][:6],
                "partial_rotary_factor": 0.75,
            },
            "pad_token_id": None,
        },
    ),
    "phi3-longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "hidden_size": 64,  # its configuration counts factors by hidden size over heads
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                key: LONGROPE[key] for key in ("rope_type", "rope_theta", "short_factor", "long_factor")
            },
            "pad_token_id": None,
        },
    ),
}


@pytest.hookimpl(tryfirst=True)  # before marks decide what runs
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_long_tail(item):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no folder {SHARED.name} with real models beside the checkout"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def build_model(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Return a tiny random float32 model of the table, with weights large enough that attention is far from uniform."""
    config_class, model_class, changes = MODELS[name]
    entries = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": dict(DEFAULT),
        **changes,
        **overrides,
    }
    config = config_class(**{key: value for key, value in entries.items() if value is not ...})
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
            elif parameter.ndim == 3:  # of all experts
                parameter.normal_(0, 1.5 / parameter.shape[2] ** 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def can_cut(name: str, component: Component, *, shape: str = "stock") -> bool:
    """Return whether the family of a model of the table lets this shape cut a component."""
    return component in family_of_row(name).compressible(shape)


def family_of_row(name: str) -> Family:
    """Return the family of a model of the table."""
    config_class, _, changes = MODELS[name]
    return family_for({"model_type": config_class.model_type, "max_position_embeddings": CONTEXT, **changes})


def mlp_width(name: str) -> int:
    """Return the MLP width of a model of the table: MPT's is four times the hidden size, whatever is asked for."""
    return 256 if name.startswith("mpt") else 96


def carries_attention(model: Any) -> bool:
    """Return whether a3 leaves the attention of a model as it is."""
    return FAMILIES[model.config.model_type].carried_attention is not None


def mlp_linears(layer: Any) -> dict[str, Any]:
    """Return the linear layers of a decoder layer's MLP by role, fused ones by both."""
    mlp = getattr(layer, "mlp", getattr(layer, "ffn", layer))
    names = {"gate": "gate_proj", "up": "up_proj", "gate_up": "gate_up_proj", "down": "down_proj"}
    if hasattr(mlp, "c_fc"):
        names = {"up": "c_fc", "down": "c_proj"}
    if hasattr(mlp, "fc1"):
        names = {"up": "fc1", "down": "fc2"}
    return {role: getattr(mlp, name) for role, name in names.items() if hasattr(mlp, name)}


def decoder_layers(model: Any) -> Any:
    """Return the decoder layers of a causal language model."""
    base = model.base_model
    return getattr(base, "h", None) or getattr(base, "blocks", None) or getattr(base, "decoder", base).layers


def attention_of(layer: Any) -> Any:
    """Return a stock decoder layer's attention module."""
    return getattr(layer, "self_attn", None) or layer.attn


def output_linear(attention: Any) -> tuple[Any, torch.Tensor]:
    """Return the output projection of a stock attention module, and its weight `[d, H·h]`."""
    name = next(name for name in ("o_proj", "out_proj", "c_proj") if hasattr(attention, name))
    linear = getattr(attention, name)
    return linear, linear.weight.T if name == "c_proj" else linear.weight


def down_weight(linear: Any) -> torch.Tensor:
    """Return the weight `[out, in]` of a stock linear layer, a view: GPT-2 stores `[in, out]`."""
    return linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight


def post_norms(layer: Any) -> dict[str, Any]:
    """Return the norms between a projection of a decoder layer, `o` or `down`, and the residual sum."""
    if not hasattr(layer, "post_feedforward_layernorm"):
        return {}
    return {"o": layer.post_attention_layernorm, "down": layer.post_feedforward_layernorm}


def gain_of(norm: Any) -> torch.Tensor:
    """Return what a norm multiplies by."""
    return norm.weight.detach() + type(norm).__name__.startswith("Gemma")


def stream_reader(layer: Any) -> Any:
    """Return the module of a decoder layer that reads the residual stream after attention."""
    if post_norms(layer):
        return getattr(layer, "pre_feedforward_layernorm", layer.mlp)
    names = ("post_attention_layernorm", "final_layer_norm", "ln_2", "norm_2")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def by_token(heads: torch.Tensor, model: Any) -> torch.Tensor:
    """Return the heads that a projection or its norm gives attention as `[B, T, H·h]`."""
    transposed = heads.ndim == 4 and model.config.model_type.startswith("gemma3")
    return (heads.transpose(1, 2) if transposed else heads).flatten(2)


def head_linears(attention: Any) -> dict[str, tuple[Any, slice]]:
    """Return the linear layer of q, k and v of a stock attention module, and the part of its output that is theirs."""
    fused = next(
        (getattr(attention, name) for name in ("qkv_proj", "c_attn", "Wqkv") if hasattr(attention, name)), None
    )
    if fused is None:
        return {name: (getattr(attention, f"{name}_proj"), slice(None)) for name in "qkv"}
    heads = attention.config.num_attention_heads if hasattr(attention, "config") else attention.n_heads
    queries = 16 * heads
    values = queries + 16 * getattr(getattr(attention, "config", None), "num_key_value_heads", heads)
    parts = {"q": slice(queries), "k": slice(queries, values), "v": slice(values, None)}
    return {name: (fused, part) for name, part in parts.items()}


def turning_pairs(config: Any) -> int:
    """Return how many pairs of a head stock transformers rotates."""
    return int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2


def as_slots(x: torch.Tensor, turning: int) -> torch.Tensor:
    """Convert a head `[..., 2n]` to complex pairs `[..., n]`: rotated pairs first, each kind in split halves."""
    parts = x[..., : 2 * turning], x[..., 2 * turning :]
    return torch.cat([torch.complex(*part.chunk(2, -1)) for part in parts], -1)


def slot_dims(size: int, turning: int, chosen: list[int]) -> list[int]:
    """Return the dims of some pairs of a full head, in the order that a head with only these pairs has."""
    places = as_slots(torch.arange(float(size)), turning)[chosen]
    kinds = [places[[c < turning for c in chosen]], places[[c >= turning for c in chosen]]]
    return [int(dim) for kind in kinds for part in (kind.real, kind.imag) for dim in part]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: nearly one token per byte, so that any text is long enough."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([""], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


@pytest.fixture(autouse=True, scope="session")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make transformers copy the code that it runs to one temporary folder instead of the user's cache.

    All tests of a process share it: the files import one another as a package, which Python locates only once.
    """
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


@pytest.fixture(autouse=True)
def forked_checker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the checking process of `a3 verify`; tests marked `own_checker` start a new process, as users do."""
    if "own_checker" not in request.keywords:
        monkeypatch.setattr("a3cli.stages.verify.running", forked)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of the demo's calibration text, which stays the same whatever is changed in the code."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    shipped = ROOT / "demo" / "text" / "calibration.txt"
    path.write_text(shipped.read_text("utf-8")[:TEXT_LENGTH], "utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a model of the table with its tokenizer, once for each distinct request. Do not write to the folder."""
    made: dict[str, Path] = {}

    def make(name: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        key = json.dumps([name, str(dtype), options], sort_keys=True, default=str)
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            save = {"max_shard_size": options.pop("max_shard_size", "5GB")}
            build_model(name, **options).to(dtype).save_pretrained(folder, **save)
            build_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@pytest.fixture(scope="session")
def command_line() -> Any:
    """Return the parser, built once per process."""
    import typer

    from a3cli.cli.app import app

    return typer.main.get_command(app)


@pytest.fixture
def a3(
    command_line: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the real command line in this process and return its exit code and output."""
    from a3cli.cli import app as cli

    monkeypatch.setattr(cli, "app", command_line)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["a3", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the refinement of query and key maps to a few steps, for tests of properties that hold after any number."""
    make_hasty(monkeypatch)


def but(arguments: tuple[object, ...], *changed: object) -> tuple[object, ...]:
    """Return arguments with other values for some options, given as pairs `"--name", value`; none may occur twice."""
    names = changed[::2]
    dropped = {i + k for i, each in enumerate(arguments) if each in names for k in (0, 1)}
    return (*(each for i, each in enumerate(arguments) if i not in dropped), *changed)


def refused(outcome, *words: str) -> None:
    """Check for exit code 2, one line on stderr that contains the words, and nothing on stdout."""
    assert outcome.code == 2, outcome
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line
    assert outcome.stdout == ""


def put_in_statistics(work: Path, name: str, value: float) -> None:
    """Write a value into layer 1 of a calibration and update the hashes, as if the sweep had written it."""
    path = work / "calibration" / "layer-001.safetensors"
    sums = load_file(path)
    sums[name].view(-1)[-1] = value
    save_file(sums, path)
    reseal(path)


def reseal(statistics: Path) -> None:
    """Update the hash of the second layer's file in the calibration's manifest, so that no hash shows the damage."""
    manifest_file = statistics.parent / "manifest.json"
    manifest = read_json(manifest_file)
    manifest["layers"][1] = hash_file(statistics)
    manifest.pop("sha256")
    write_manifest(manifest_file, manifest)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return every file and folder below a folder, except the lock, an empty file that stays."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.fixture(scope="session")
def prepared(checkpoint, text_file, tmp_path_factory) -> Path:
    """Return a folder with `source`, sharded, and its calibration and solution in `work`. Do not write there."""
    from a3cli.settings import CalibrateSettings, SolveSettings, make_settings
    from a3cli.stages.calibrate import calibrate
    from a3cli.stages.solve import solve
    from a3cli.work.folder import Work

    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(checkpoint("llama-gqa", max_shard_size="40KB"), folder / "source")
    text = {"dataset": str(text_file), "samples": 3, "seq_len": 32}
    settings = make_settings(CalibrateSettings, model=str(folder / "source"), text=text)
    calibrate(settings, Work(folder / "work"), overwrite=False, progress=lambda **at: None)
    settings = make_settings(SolveSettings, budget=0.25, mlp_multiple=8, head_multiple=2)
    solve(settings, Work(folder / "work"), overwrite=False, progress=lambda **at: None)
    return folder


@pytest.fixture
def source(prepared, tmp_path) -> Path:
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(prepared / "source", tmp_path / "source"))


@pytest.fixture
def work(a3, prepared, source, text_file, tmp_path) -> Path:
    """Return a copy of the work folder whose source was moved to `source`."""
    folder = Path(shutil.copytree(prepared / "work", tmp_path / "work"))
    assert a3("calibrate", source, "--dataset", text_file, *SHORT, "--work", folder).code == 0
    return folder
