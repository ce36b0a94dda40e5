"""The part of `a3 verify` that runs in its own process, with torch, transformers, safetensors and blake3 only.

    python checker.py REQUEST.json

It reads the request and prints one JSON object per line for each check: name, outcome (passed, failed, skipped),
and detail. It imports nothing of a3, so the checks also hold for users who load the folder with stock transformers.
"""

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Json = dict[str, Any]
MANIFEST = "a3_manifest.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".pkl", ".onnx", ".npz")
STOCK_CODE = "transformers.models."
NEW_TOKENS = 20


class Failed(Exception):
    """A failed check, with the reason."""


class Export:
    """The folder to check, and the request."""

    def __init__(self, request: Json) -> None:
        self.folder = Path(request["folder"])
        self.code: Json | None = request["code"]  # hashes by file and auto_map of the code that may run; None: no code
        self.shapes: dict[str, list[int]] = request["shapes"]
        self.auto_class: str = request["auto_class"]
        self.renames: list[list[str]] = request["renames"]  # prefixes of names in files, and those of the class
        self.vocabulary: int = request["vocabulary"]
        self.carried: tuple[str, ...] = tuple(request["carried"])  # prefixes of tensors that the class does not know
        self.experts: Json | None = request["experts"]  # the files' names of experts; None: there are none
        self.tokens: torch.Tensor = load_file(request["tokens"])["tokens"]
        self.logits = Path(request["logits"])
        self.device: str = request["device"]
        self.dtype: torch.dtype = getattr(torch, request["dtype"])
        self.tolerance: float = request["tie"]
        self.model: Any = None

    def json(self, name: str) -> Json:
        try:
            value = json.loads((self.folder / name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Failed(f"{name} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise Failed(f"{name} is not a JSON object")
        return value

    def class_name(self, stored: str) -> str:
        """Return the name that the class has for a tensor of the files."""
        for old, new in self.renames:
            if stored.startswith(old):
                return new + stored.removeprefix(old)
        return stored

    def require_shapes(self) -> None:
        """Raise Failed if config.json describes no model, which transformers could try to build anyway."""
        if not self.shapes:
            raise Failed("config.json does not describe a model")

    def weight_files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of every file; only one is in memory at a time."""
        for path in self.weight_files():
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, a safetensors file is no dictionary
                    yield name, file.get_tensor(name)


def check_files(export: Export) -> str:
    """Check that every file in the manifest has its hash, and that there are no other weights or code."""
    listed = export.json(MANIFEST).get("files")
    if not isinstance(listed, dict) or not listed:
        raise Failed(f"{MANIFEST} lists no files")
    problems = []
    for name, expected in sorted(listed.items()):
        path = export.folder / name
        if Path(name).name != name or not path.is_file():
            problems.append(f"{name} is missing")
        elif hash_file(path) != expected:
            problems.append(f"{name} is not the file that was written: its hash differs")
    for path in sorted(export.folder.rglob("*")):
        inside = path.relative_to(export.folder).as_posix()
        if inside not in listed and path.suffix.lower() in (*WEIGHTS, ".py"):
            problems.append(f"{inside} was not written by a3 export")
    raise_for(problems)
    return f"{len(listed)} files have the hashes of {MANIFEST}, and there are no other weights"


def check_code(export: Export) -> str:
    """Check that only code shipped by a3 runs, and only as the classes of the model."""
    found = export.json("config.json").get("auto_map")
    if export.code is None:
        if found is not None:
            raise Failed("config.json has an auto_map, but a stock checkpoint needs no code")
        return "needs no code of its own"
    if found != export.code["auto_map"]:
        raise Failed(f"config.json: auto_map is {found}, not {export.code['auto_map']}")
    for name, expected in export.code["files"].items():
        path = export.folder / name
        if not path.is_file() or hash_file(path) != expected:
            raise Failed(f"{name} is not the file that this a3 ships; no code of the folder was run")
    return f"{' and '.join(export.code['files'])} equal the files that a3 ships, so they may run"


def check_tensors(export: Export) -> str:
    """Check that names and shapes in the files' headers match config.json and the manifest's sizes, each name once."""
    export.require_shapes()
    found: dict[str, list[int]] = {}
    places: dict[str, str] = {}
    problems = []
    for path in export.weight_files():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in found:
                    problems.append(f"{name} is in two files")
                found[name], places[name] = list(file.get_slice(name).get_shape()), path.name
    if not found:
        raise Failed("there are no weight files")
    of_class = {export.class_name(name): shape for name, shape in found.items()}
    for name, shape in sorted(export.shapes.items()):
        if name not in of_class:
            problems.append(f"{name} is missing")
        elif of_class[name] != shape:
            problems.append(f"{name} is {of_class[name]}, config.json says {shape}")
    indexed = len(export.weight_files()) > 1 or (export.folder / INDEX).exists()
    if indexed and export.json(INDEX).get("weight_map") != places:
        problems.append(f"{INDEX} does not say where the tensors are")
    raise_for(problems)
    return f"{len(found)} tensors, {len(export.shapes)} of them of the sizes that config.json gives"


def check_finite(export: Export) -> str:
    count, problems = 0, []
    for name, tensor in export.tensors():
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.reshape(-1).split(1 << 22))
        count += tensor.numel()
        if bad:
            problems.append(f"{name} has {bad} NaN or Inf")
    raise_for(problems)
    return f"{count:,} values, no NaN and no Inf"


def check_card(export: Export) -> str:
    path = export.folder / "README.md"
    if not path.is_file():
        raise Failed("README.md is missing")
    lines = path.read_text("utf-8").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        raise Failed("README.md has no metadata at its top")
    return "README.md has its metadata"


def check_tokenizer(export: Export) -> str:
    """Check that the tokenizer loads without code and that its tokens fit the vocabulary."""
    from transformers import AutoTokenizer

    export.require_shapes()  # transformers reads config.json for a tokenizer too
    tokenizer = AutoTokenizer.from_pretrained(export.folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer("A smaller model, tomorrow: 3.14 ≈ π\n")["input_ids"]
    if not ids or max(ids) >= export.vocabulary:
        raise Failed(f"it gives tokens {ids}, the model has {export.vocabulary}")
    return f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens"


def check_load(export: Export) -> str:
    """Check that the model has all tensors of the files, unchanged: none missing, left over or of another shape."""
    import transformers

    model, info = getattr(transformers, export.auto_class).from_pretrained(
        export.folder,
        dtype=export.dtype,
        device_map="auto" if export.device == "auto" else export.device,
        use_safetensors=True,
        trust_remote_code=export.code is not None,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
    )
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    unused = (name for name in sorted(info["unexpected_keys"]) if not name.startswith(export.carried))
    problems += [f"{name} is not used" for name in unused]
    problems += [f"{name} is {list(a)}, not {list(b)}" for name, a, b in sorted(info["mismatched_keys"])]
    raise_for(problems)
    loaded = model.state_dict()
    for name, tensor in export.tensors():
        if name.startswith(export.carried):
            continue
        found = find_loaded(loaded, export.class_name(name), export.experts)
        if found is None or found.shape != tensor.shape:
            raise Failed(f"{name} is {list(tensor.shape)} in its file and not in the loaded model")
        if found.device.type != "meta" and not torch.equal(found.cpu(), tensor.to(export.dtype)):
            raise Failed(f"{name} has other values in the loaded model than in its file")
    module = type(model).__module__
    if export.code is None and not module.startswith(STOCK_CODE):
        raise Failed(f"the class {module}.{type(model).__name__} is not a class of transformers")
    export.model = model.eval()
    return f"{type(model).__name__}, {'stock' if export.code is None else 'from the code in the folder'}"


def find_loaded(loaded: dict[str, torch.Tensor], name: str, experts: Json | None) -> torch.Tensor | None:
    """Return what a file's tensor fills in the loaded model, None if nothing.

    transformers 5 holds the experts of a layer in two tensors, `[experts, …]`: gate above up, and down.
    """
    if name in loaded or experts is None:
        return loaded.get(name)
    own = name.replace(f".{experts['block']}.", ".mlp.")
    found = re.fullmatch(r"(.+\.experts\.)(\d+)\.(\w+)\.weight", own)
    if found is None:
        return loaded.get(own)
    role = experts["roles"].get(found[3])
    together = loaded.get(found[1] + ("down_proj" if role == "down" else "gate_up_proj"))
    if role is None or together is None or int(found[2]) >= len(together):
        return None
    weight = together[int(found[2])]
    return weight if role == "down" else weight.chunk(2)[role == "up"]


@torch.inference_mode()
def check_generate(export: Export) -> str:
    """Check that greedy generation gives the same tokens with and without a cache, except for ties within rounding."""
    prompt = export.tokens[:, : max(1, min(16, export.tokens.shape[1] - NEW_TOKENS))].to(export.model.device)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": 0,
    }
    cached, plain = (export.model.generate(prompt, use_cache=use, **options).cpu() for use in (True, False))
    for row, (ours, theirs) in enumerate(zip(cached, plain, strict=True)):
        different = (ours != theirs).nonzero().flatten().tolist()
        if not different:
            continue
        place = different[0]
        answer = export.model(theirs[None, :place].to(export.model.device), use_cache=False).logits[0, -1].float().cpu()
        gap = (answer[theirs[place]] - answer[ours[place]]).abs() / answer.abs().max()
        if gap > export.tolerance:
            raise Failed(
                f"with a cache token {place - prompt.shape[1] + 1} of prompt {row + 1} is {ours[place]}, "
                f"without one {theirs[place]}"
            )
    same = "the same tokens" if torch.equal(cached, plain) else "the same tokens, except for ties within rounding"
    return f"{NEW_TOKENS} tokens for each of {len(prompt)} prompts: {same} with a cache as without"


@torch.inference_mode()
def check_forward(export: Export) -> str:
    """Check that the logits of the request's tokens are finite; write them for the comparison with the reference."""
    answers = [export.model(row[None].to(export.model.device), use_cache=False).logits for row in export.tokens]
    logits = torch.cat([answer.float().cpu() for answer in answers]).contiguous()
    if not torch.isfinite(logits).all():
        raise Failed("the logits have NaN or Inf values")
    save_file({"logits": logits}, export.logits)
    return f"finite logits for {export.tokens.numel()} tokens in {str(export.dtype).removeprefix('torch.')}"


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        digest = blake3()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"blake3:{digest.hexdigest()}"


def raise_for(problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise Failed("; ".join(problems[:5]) + more)


# name → (check, the checks that it requires)
CHECKS: dict[str, tuple[Callable[[Export], str], tuple[str, ...]]] = {
    "files": (check_files, ()),
    "code": (check_code, ()),
    "tensors": (check_tensors, ()),
    "finite": (check_finite, ()),
    "card": (check_card, ()),
    "tokenizer": (check_tokenizer, ()),
    "load": (check_load, ("code", "tensors")),  # a model larger than its files could exhaust memory
    "generate": (check_generate, ("load",)),
    "forward": (check_forward, ("load",)),
}


def main() -> None:
    export = Export(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    outcomes: dict[str, str] = {}
    for name, (check, needed) in CHECKS.items():
        missing = [other for other in needed if outcomes[other] != "passed"]
        if missing:
            outcome, detail = "skipped", f"needs {', '.join(missing)}"
        else:
            outcome, detail = attempt(check, export)
        outcomes[name] = outcome
        print(json.dumps({"name": name, "outcome": outcome, "detail": detail}), flush=True)


def attempt(check: Callable[[Export], str], export: Export) -> tuple[str, str]:
    try:
        return "passed", check(export)
    except Failed as failure:
        return "failed", str(failure)
    except Exception as error:  # damaged folders make the libraries raise anything
        traceback.print_exc()
        return "failed", " ".join(f"{type(error).__name__}: {error}".split())[:500]


if __name__ == "__main__":
    main()
