"""Make random bfloat16 checkpoints of well-known shapes, with a byte-level tokenizer; and measure processes.

    python benchmarks/random_checkpoint.py FOLDER --shape 8b [--layers 8]

One tensor is in memory at a time. The other benchmarks use this file. It imports torch and a3cli only where a
checkpoint is made, in a separate process: a child's peak memory starts at its parent's, so a large parent would hide
the needs of a small child.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD_BYTES = 10**9
TEXT_BYTES = 1 << 20
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_theta": 500000.0,
}


def shape(hidden: int, width: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        **COMMON,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": False,
        "rope_scaling": LLAMA3,
        **more,
    }


SHAPES = {
    "tiny": shape(256, 512, 4, 4, 2, vocab_size=512, max_position_embeddings=4096, rope_scaling=None),
    "small": shape(1024, 2048, 8, 16, 4, vocab_size=4096),
    "135m": shape(576, 1536, 30, 9, 3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True),
    "0.3b": shape(1024, 2816, 24, 16, 4, vocab_size=32000, max_position_embeddings=8192, tie_word_embeddings=True),
    "1b": shape(2048, 8192, 16, 32, 8, tie_word_embeddings=True, rope_scaling={**LLAMA3, "factor": 32.0}),
    "8b": shape(4096, 14336, 32, 32, 8),
    "70b": shape(8192, 28672, 80, 64, 8),
}


def config_of(name: str, layers: int | None = None) -> dict[str, Any]:
    config = SHAPES[name]
    return config if layers is None else {**config, "num_hidden_layers": layers}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the checkpoint."""
    d, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (query, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, query),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (mlp, d),
        "mlp.up_proj": (mlp, d),
        "mlp.down_proj": (d, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d)}
    for index in range(config["num_hidden_layers"]):
        shapes.update({f"model.layers.{index}.{name}.weight": size for name, size in layer.items()})
    shapes["model.norm.weight"] = (d,)
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (vocabulary, d)}


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write random weights, config and tokenizer."""
    import torch

    from a3cli.models.hub import INDEX
    from a3cli.models.shards import PlannedTensor, plan_shards, write_index, write_shard

    generator = torch.Generator().manual_seed(0)

    def random(tensor: PlannedTensor) -> torch.Tensor:
        if len(tensor.shape) == 1:
            return torch.ones(tensor.shape, dtype=tensor.dtype)
        return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0, 0.02, generator=generator)

    folder.mkdir(parents=True, exist_ok=True)
    planned = [PlannedTensor(name, size, torch.bfloat16) for name, size in tensor_shapes(config).items()]
    shards = plan_shards(planned, SHARD_BYTES)
    for shard, tensors in shards.items():
        write_shard(folder / shard, tensors, map(random, tensors))
    if len(shards) > 1:
        write_index(folder / INDEX, shards)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)


def make_text(path: Path) -> Path:
    """Write the first MiB of Python's standard library."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    path.write_bytes(b"".join(source.read_bytes() for source in sources)[:TEXT_BYTES])
    return path


def make_in_a_child(folder: Path, name: str, layers: int | None = None) -> Path:
    """Call `make_checkpoint` in another process, so that this process stays small."""
    run(__file__, folder, "--shape", name, *(() if layers is None else ("--layers", layers)))
    return folder


@dataclass(frozen=True)
class Measured:
    """Seconds and peak resident bytes of a process, and its output."""

    seconds: float
    peak: int
    output: str


def run(*command: object) -> Measured:
    """Run one Python process to its end. Exits if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process.stdout, process.stderr:
        output, errors = process.stdout.read(), process.stderr.read()  # our commands print little: no pipe fills up
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed with exit code {process.returncode}\n{errors}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(time.perf_counter() - started, peak, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    arguments = parser.parse_args()
    make_checkpoint(arguments.folder, config_of(arguments.shape, arguments.layers))


if __name__ == "__main__":
    main()
