"""Do exported folders load, generate and give the same logits under several transformers versions?

    python benchmarks/loaders.py FOLDER [FOLDER ...] [--transformers 4.57.6 5.23.0] [--torch 2.13.0]

For each version a clean environment with only torch and transformers in it is made in a temporary folder. Each FOLDER
is loaded there with `AutoModelForCausalLM` (every weight used and none missing; remote code only if the layers differ
in size), run on the same tokens and made to generate with its cache. Exit code 1 if any version disagrees with the
first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys, torch, transformers
from pathlib import Path
from transformers import AutoModelForCausalLM
per_layer = "per_layer_config" in json.loads(Path(sys.argv[1], "config.json").read_text("utf-8"))
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], torch_dtype=torch.float32, output_loading_info=True, trust_remote_code=per_layer
)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
model.eval()
length = min(model.config.max_position_embeddings, 384)
tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    logits = model(tokens).logits
    options = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
    # Not across the context at which longrope switches: the keys in any cache are those of the other table.
    size = min(64, getattr(model.config, "original_max_position_embeddings", 128) - 24)
    prompt = dict(input_ids=tokens[:, :size], attention_mask=torch.ones(2, size))
    cached, plain = (model.generate(**prompt, use_cache=use, **options) for use in (True, False))
torch.save(logits, sys.argv[2])
same = bool(torch.equal(cached, plain))
print(json.dumps({"version": transformers.__version__, "cache": same, "tokens": cached[:, size:].tolist()}))
"""


def make_environment(folder: Path, torch: str, transformers: str) -> Path:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    packages = [f"torch=={torch}", f"transformers=={transformers}", "numpy"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def run(python: Path, model: Path, logits: Path) -> dict:
    """Code that comes with a model is copied into the temporary folder, not into the user's cache."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(python.parents[2] / "modules")}
    output = subprocess.run(
        [python, "-c", CHILD, str(model), str(logits)], check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--transformers", nargs="+", default=["5.23.0", "4.57.6"])
    parser.add_argument("--torch", default="2.13.0")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as place:
        pythons = [make_environment(Path(place) / version, args.torch, version) for version in args.transformers]
        print("| checkpoint | transformers | relative logit difference | generates with cache as without |")
        print("|---|---|---|---|")
        for model in args.folders:
            results = []
            for version, python in zip(args.transformers, pythons, strict=True):
                path = Path(place) / f"{version}.pt"
                results.append((run(python, model, path), torch.load(path, weights_only=True)))
            for result, logits in results:
                difference = ((logits - results[0][1]).norm() / logits.norm()).item()
                ok = difference < 1e-5 and result["cache"] and result["tokens"] == results[0][0]["tokens"]
                failed |= not ok
                print(
                    f"| {model.name} | {result['version']} | {difference:.1e} | {'yes' if result['cache'] else 'NO'} |"
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
