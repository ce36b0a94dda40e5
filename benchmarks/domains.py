"""Measure the loss of the stock shape on text of another domain, by component and by calibration text.

    python benchmarks/domains.py SHARED [--write docs/quality.md] [--blocks 32]

The model is wikitext-llama, with one-shot solutions, calibrated on its own text, on half of the C4 sample, and on both
(`a3 stats merge`), and measured on its own test text and on the other half of the C4 sample. The whole solution is
compared with the MLP alone and attention alone at the same sizes, and with the strongest baseline, SVD-LLM, with the
same blocks.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from a3cli.work.folder import Work  # noqa: E402
from benchmarks.baselines import BASELINES, Calibration  # noqa: E402
from benchmarks.quality import BATCH, SEQ_LEN, Bench, Plan, Subject, a3, load, subjects  # noqa: E402
from benchmarks.results import heading, split_lines, write_between  # noqa: E402

BUDGETS = (0.2, 0.4)
SAMPLES = 128
OWN, OTHER, BOTH = "own text", "C4", "own text and C4"
HEADER = ("removed", "calibrated on", "what is cut", "increase", "KL (nats)", "increase, C4", "KL, C4")


def calibrate(subject: Subject, other: Path, folder: Path) -> dict[str, Work]:
    """Return a work folder for each calibration text."""
    works = {name: Work(folder / name.replace(" ", "-")) for name in (OWN, OTHER, BOTH)}
    for name, text in ((OWN, subject.calibration), (OTHER, other)):
        line = f"calibrate --samples {SAMPLES} --seq-len {SEQ_LEN} --batch-size {BATCH} --dtype float32"
        a3(line, subject.folder, "--dataset", text, "--work", works[name].folder)
    a3("stats merge", works[OWN].folder, works[OTHER].folder, "--into", works[BOTH].folder)
    return works


def cuts(work: Work, budget: float, subject: Subject, folder: Path) -> dict[str, Any]:
    """Return the whole solution's model, and those in which only attention or only the MLP has its sizes."""
    solve = f"solve {subject.rounding} --overwrite --work {work.folder}"
    whole = a3(f"{solve} --budget {budget}")
    models = {"all": export(work, folder / "all")}
    less = 1e-9  # gives the same sizes, despite the rounding of decimal budgets
    for part, components in (("attention", "qk,ov"), ("mlp", "mlp")):
        size = "head_dim" if part == "attention" else "intermediate_size"
        before, after = whole[size]["before"], whole[size]["after"]
        if after < before:
            a3(f"{solve} --components {components} --{part}-budget {1 - after / before - less}")
            models[f"{part} alone, {before} → {after}"] = export(work, folder / part)
    return models


def export(work: Work, out: Path) -> Any:
    a3("export --dtype float32 --overwrite", out, "--work", work.folder)
    return load(out, torch.device("cpu"))


def rows(bench: Bench, works: dict[str, Work], folder: Path) -> list[str]:
    found = []
    for budget in BUDGETS:
        for text, work in works.items():
            calibration = Calibration(bench.source, load_file(work.tokens)["tokens"], batch_size=BATCH)
            models = {
                "SVD-LLM": BASELINES["svd_llm"](calibration, budget).model,
                **{f"a3 best: {what}": model for what, model in cuts(work, budget, bench.subject, folder).items()},
            }
            for what, model in models.items():
                own, other = (bench.measure(model)[name] for name in ("own", "other"))
                figures = [f"{each['perplexity_increase']:+.2f} | {each['kl']:.4f}" for each in (own, other)]
                found.append(f"| {budget:.0%} | {text} | {what} | ".replace("%", " %") + " | ".join(figures) + " |")
                print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--write", type=Path, help="replace the table between the markers of this file")
    parser.add_argument("--blocks", type=int, default=32, help="evaluate on so many blocks of each text")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subject = next(subjects(args.shared, folder))
        evaluation, other = split_lines(args.shared / "data" / "c4-sample.jsonl", folder)
        plan = Plan(args.shared, folder, folder, torch.device("cpu"), BUDGETS, (0,), args.blocks, ())
        bench = Bench(subject, plan, other=evaluation)
        table = rows(bench, calibrate(subject, other, folder), folder)
    printed = "\n".join([*heading(HEADER), *table])
    print(printed)
    if args.write:
        write_between(args.write, "domains", printed)


if __name__ == "__main__":
    main()
