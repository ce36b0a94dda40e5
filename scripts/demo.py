"""Run the main job on the shipped model: calibrate, solve, export, and use the result with stock transformers.

    make demo

The text is the standard library of the Python that runs this (`demo_text.py`). Everything is written to
`.demo/`, which is emptied first.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import demo_text

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo" / "model"
PLACE = ROOT / ".demo"
WORK, OUT = PLACE / "work", PLACE / "model-25-percent-smaller"
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n\n    def"
SEQ_LEN = 512


def a3(*arguments: object) -> str:
    """Run one command as a user would, and print it; return its output."""
    shown = [str(a.relative_to(ROOT)) if isinstance(a, Path) else str(a) for a in arguments]
    print(f"\n$ a3 {' '.join(shown)}", flush=True)
    command = [sys.executable, "-m", "a3cli", *shown]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def compress() -> dict:
    """Run the three commands and return the solution's manifest."""
    text = ("--dataset", PLACE / "calibration.txt", "--samples", 128, "--seq-len", SEQ_LEN, "--batch-size", 8)
    print(a3("calibrate", MODEL, *text, "--work", WORK), end="")
    print(a3("solve", "--budget", 0.25, "--work", WORK), end="")
    print(a3("export", OUT, "--work", WORK), end="")
    return json.loads((WORK / "solution" / "manifest.json").read_text())


def measure() -> dict:
    text = ("--dataset", PLACE / "evaluation.txt", "--seq-len", SEQ_LEN, "--batch-size", 8)
    return json.loads(a3("eval", OUT, "--against", MODEL, *text, "--json"))


def write_code(folder: Path) -> str:
    """Return a greedy continuation of the prompt, from stock transformers without remote code."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = model.generate(
        **tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=60, do_sample=True, temperature=0.6, top_p=0.9
    )
    return tokenizer.decode(tokens[0])


def main() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    demo_text.main(PLACE)
    solution = compress()
    result = measure()
    rows = [
        ("perplexity on held-out modules", result["source_perplexity"], result["perplexity"]),
        ("parameters", solution["parameters"]["before"], solution["parameters"]["after"]),
        ("weight bytes", *((folder / "model.safetensors").stat().st_size for folder in (MODEL, OUT))),
        ("KV cache, bytes per token", *(solution["kv_bytes_per_token"][when] for when in ("before", "after"))),
    ]
    print(f"\n{'':32}{'before':>12}{'after':>12}")
    for name, before, after in rows:
        figures = (f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" for v in (before, after))
        print(f"{name:32}" + "".join(f"{figure:>12}" for figure in figures))
    for title, folder in (("before", MODEL), ("after", OUT)):
        print(f"\n--- {title} writes ---\n{write_code(folder)}")
    print(f"\n{OUT}")


if __name__ == "__main__":
    main()
