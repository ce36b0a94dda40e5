"""Peak memory of calibrate, solve and export on a checkpoint of a billion parameters, against its size on disk.

Makes a random checkpoint of the shape of Llama-3.2-1B (bfloat16, shards of 1 GB), written tensor by tensor, with a
byte-level tokenizer and some of Python's own source as text. Each stage then runs as a process of its own, on the CPU,
in its default dtype there (float32). What counts is the process's peak resident set, mapped pages of files that it
touched included, less that of a process that only imports torch and transformers. The exit code is 1 if calibrate or
export needs more than 40 % of the checkpoint's size. Takes about 8 GB of disk for a while, and cleans up.

    python benchmarks/memory.py [--folder DIR] [--samples 2] [--seq-len 2048] [--batch-size 1] [--method paper]

`--method best` solves for much longer, and needs more tokens than the MLP is wide (8192) to mean anything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# This process imports neither torch nor a3cli, and makes the checkpoint in a child: a child's peak counts from
# its parent's, so a large parent would hide what a small child needs.

LIMIT = 0.4
LIMITED = ("calibrate", "export")
SHARD_BYTES = 10**9
TEXT_BYTES = 1 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint; the output layer is the embedding."""
    d, mlp = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    query, kv = (CONFIG[key] * CONFIG["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
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
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], d)}
    for index in range(CONFIG["num_hidden_layers"]):
        shapes.update({f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()})
    return {**shapes, "model.norm.weight": (d,)}


def make_checkpoint(folder: Path) -> None:
    """Random weights, config, tokenizer. Holds one tensor at a time."""
    import torch

    from a3cli.checkpoint import INDEX, PlannedTensor, plan_shards, shard_names, write_index, write_shard

    generator = torch.Generator().manual_seed(0)

    def random(tensor: PlannedTensor) -> torch.Tensor:
        if len(tensor.shape) == 1:
            return torch.ones(tensor.shape, dtype=tensor.dtype)
        return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0, 0.02, generator=generator)

    planned = [PlannedTensor(name, shape, torch.bfloat16) for name, shape in tensor_shapes().items()]
    groups = plan_shards(planned, SHARD_BYTES)
    shards = dict(zip(shard_names(len(groups)), groups, strict=True))
    for shard, tensors in shards.items():
        write_shard(folder / shard, tensors, (random(tensor) for tensor in tensors))
    write_index(folder / INDEX, shards)
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)


def make_text(path: Path) -> None:
    """The first MiB of Python's standard library."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    path.write_bytes(b"".join(source.read_bytes() for source in sources)[:TEXT_BYTES])


def peak_memory(*command: object) -> int:
    """Peak resident bytes of a Python process. Exits if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed with exit code {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stages(folder: Path, arguments: argparse.Namespace) -> dict[str, list[object]]:
    """Each stage's command line."""
    work = ["--work", folder / "work", "--quiet"]
    text = ["--dataset", folder / "text.txt", "--samples", arguments.samples, "--seq-len", arguments.seq_len]
    text += ["--batch-size", arguments.batch_size]
    return {
        "calibrate": ["calibrate", folder / "source", *text, "--device", "cpu", *work],
        "solve": ["solve", "--budget", 0.25, "--method", arguments.method, *work],
        "export": ["export", folder / "export", *work],
    }


def measure(folder: Path, arguments: argparse.Namespace) -> bool:
    """Print the table; False if a stage exceeds the limit."""
    source = folder / "source"
    source.mkdir()
    peak_memory(__file__, "--make", source)
    make_text(folder / "text.txt")
    size = sum(shard.stat().st_size for shard in source.glob("*.safetensors"))
    baseline = peak_memory("-c", "import torch, transformers")
    print(
        f"checkpoint {size / 1e9:.2f} GB, {arguments.samples} blocks of {arguments.seq_len} tokens, "
        f"{arguments.batch_size} a batch, method {arguments.method}"
    )
    print(f"{'process':<12}{'peak MB':>10}{'above imports':>16}{'share of checkpoint':>22}")
    print(f"{'imports':<12}{baseline / 1e6:>10.0f}")
    within = True
    for stage, command in stages(folder, arguments).items():
        peak = peak_memory("-m", "a3cli", *command)
        share = (peak - baseline) / size
        over = stage in LIMITED and share > LIMIT
        within &= not over
        note = f"  over the limit of {LIMIT:.0%}" if over else ""
        print(f"{stage:<12}{peak / 1e6:>10.0f}{(peak - baseline) / 1e6:>16.0f}{share:>22.1%}{note}", flush=True)
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder (default: the system's place)")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--method", default="paper", help="of a3 solve")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_checkpoint(arguments.make)
        return 0
    with tempfile.TemporaryDirectory(prefix="a3-memory-", dir=arguments.folder) as folder:
        return 0 if measure(Path(folder), arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
