"""Hash a3's results for a few models, to show that a change of the code changes no byte of them.

    python scripts/same_bytes.py before.json                      before the change
    python scripts/same_bytes.py after.json --against before.json    after it: exit code 1 if anything differs

There are four models (the demo model and three random ones of other families), each compressed in three ways; hashed
are statistics, solutions, weights and config.json. All run in a temporary folder on one thread, so sums have one order.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from loaders import ROOT, Subject, make_source

SOURCES = {
    "llama-demo": None,
    "mistral": Subject("mistral", "mistral", config={"sliding_window": 64}),
    "starcoder2": Subject("starcoder2", "starcoder2", config={"sliding_window": None}),
    "nemotron": Subject("nemotron", "nemotron", config={"partial_rotary_factor": 0.5}),
}
WAYS = {
    "stock best": ("--budget", "0.25"),
    "per-layer sequential": ("--budget", "0.25", "--shape", "per-layer", "--sequential"),
    "paper": ("--budget", "0.25", "--method", "paper"),
}


def a3(*arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "a3cli", *map(str, arguments), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)


def hash_all(name: str, subject: Subject | None, folder: Path) -> dict[str, str]:
    """Compress one source in every way; return the hash of each compared file by its name."""
    from a3cli.work.files import hash_file

    source = ROOT / "demo" / "model"
    if subject is not None:
        source = folder / "source"
        make_source(subject, source)
    text = ("--dataset", ROOT / "demo" / "text" / "calibration.txt", "--samples", 16, "--seq-len", 256)
    a3("calibrate", source, *text, "--work", folder)
    hashes = {}
    for way, options in WAYS.items():
        a3("solve", *options, "--work", folder, "--overwrite")
        a3("export", folder.parent / "out", "--work", folder, "--overwrite")
        files = [*folder.glob("*/layer-*.safetensors"), *folder.parent.glob("out/*.safetensors")]
        for file in sorted([*files, folder.parent / "out" / "config.json"]):
            hashes[f"{name}, {way}: {file.parent.name}/{file.name}"] = hash_file(file)
    return hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("found", type=Path, help="file to write the hashes to")
    parser.add_argument("--against", type=Path, help="hashes of an earlier run")
    args = parser.parse_args()
    hashes = {}
    for name, subject in SOURCES.items():
        with tempfile.TemporaryDirectory() as place:
            hashes |= hash_all(name, subject, Path(place) / "work")
    args.found.write_text(json.dumps(hashes, indent=1) + "\n", "utf-8")
    if args.against:
        before = json.loads(args.against.read_text("utf-8"))
        differing = [name for name in sorted(before.keys() | hashes.keys()) if before.get(name) != hashes.get(name)]
        for name in differing:
            print(f"differs: {name}")
        print(f"{len(hashes) - len(differing)} of {len(hashes)} files are the same")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
