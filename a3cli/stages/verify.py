"""Check an export as its users will load it: with stock transformers.

`checker.py` runs in its own process, without a3. This module prepares its request and compares its logits with the
full-size reference, which needs the work folder of the export.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import index
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import torch
from safetensors.torch import load_file, save_file

from a3cli.errors import A3Error, CheckFailed
from a3cli.models.config import LARGEST, check_sizes, read_shape
from a3cli.models.experts import checkpoint_names, weight_names
from a3cli.models.families import LayerSizes, ModelShape, decoder_config, family_of, usual_entries
from a3cli.models.families.base import HEAD_NORM_ROLES
from a3cli.models.families.wrappers import Wrapper, wrapper_of
from a3cli.models.fused import stored_shape
from a3cli.models.model import Model, open_calibrated_source
from a3cli.models.shipped import shipped_files
from a3cli.report.junit import Case
from a3cli.report.manifest import MANIFEST
from a3cli.settings import ExportSettings, VerifySettings
from a3cli.stages.exported_config import auto_map
from a3cli.stages.solution import Solution, find_solution, read_solution
from a3cli.stream.reference import FullSizeReference, reference_logits
from a3cli.work.files import Json, check_hash, hash_file, read_json, read_tensors
from a3cli.work.folder import Work
from a3cli.work.machine import Machine, choose_machine
from a3cli.work.progress import Progress, reporting, silent
from a3cli.work.sealed import unaltered, versions

log = logging.getLogger(__name__)

CHECKER = Path(__file__).parent / "checker.py"
CHECKED_APART = ("files", "code", "tensors", "finite", "card", "tokenizer", "load", "generate", "forward")
PROMPTS, LENGTH = 2, 128
# The export may be this many times as far from the exact reference as the rounded reference is.
MARGIN = 3
FLOOR = 16 * torch.finfo(torch.float32).eps
# Two tokens are a tie if their logits differ by at most this many roundings of the largest logit.
TIE = 16


def verify(out: Path, settings: VerifySettings, work: Work, *, progress: Progress = silent) -> Json:
    """Return every check with its outcome (passed, failed, skipped) and detail; `passed` if none failed.

    Raises A3Error if `out` is not an export, or for code that may not run.
    """
    manifest, damage = read_export(out)
    per_layer = "per_layer_config" in manifest["config"]
    if per_layer and not settings.trust_remote_code:
        raise A3Error(
            f"{out}: its layers differ in size, and only the code in its folder builds them; use --trust-remote-code "
            "(that code is run only if it equals the code that a3 ships)"
        )
    machine = choose_machine(settings.device, "float32" if settings.dtype == "auto" else settings.dtype, torch.float32)
    config, shapes = check_config(manifest, damage)
    reference = open_reference(work, manifest, progress)
    with tempfile.TemporaryDirectory(prefix="a3-verify-") as temporary:
        folder = Path(temporary)
        save_file({"tokens": choose_tokens(work, manifest["config"], reference)}, folder / "tokens.safetensors")
        request = {
            "folder": as_utf8(out.resolve()),
            "code": code_of(manifest["config"]) if per_layer and shapes else None,
            "shapes": shapes,
            "carried": family_of(manifest["config"]["model_type"]).carried if shapes else (),
            "experts": checkpoint_names(family_of(manifest["config"]["model_type"])) if shapes else None,
            **loading(manifest["wrapper"]),
            "vocabulary": manifest["config"].get("vocab_size"),
            "tokens": as_utf8(folder / "tokens.safetensors"),
            "logits": as_utf8(folder / "logits.safetensors"),
            "device": settings.device if machine.device.type == "cuda" else str(machine.device),
            "dtype": str(machine.dtype).removeprefix("torch."),
            "tie": TIE * torch.finfo(machine.dtype).eps,
        }
        with reporting(progress, f"checking {out.name}"):
            checks = [config, *run_checker(request, folder)]
        checks.append(check_reference(reference, manifest, machine, folder, required=settings.require_reference))
    passed = all(check["outcome"] != "failed" for check in checks)
    return {"model": str(out), "passed": passed, "checks": checks, "versions": versions()}


def read_export(out: Path) -> tuple[Json, list[str]]:
    """Return the export's manifest, with `config` and `wrapper`, and why a file, then empty, cannot be read.

    `config` is what config.json says of the decoder, `wrapper` what holds it. Raises A3Error if `out` is no export.
    """
    if not out.is_dir():
        raise A3Error(f"{out} is not a folder; give the output folder of a3 export")
    if not (out / MANIFEST).is_file():
        raise A3Error(f"{out} has no {MANIFEST}; give the output folder of a3 export")
    manifest, config, damage = {"solution": {}, "dtype": "source"}, {}, []
    try:
        manifest = open_manifest(out / MANIFEST)
    except A3Error as error:
        damage.append(str(error))
    try:
        config = read_json(out / "config.json")
    except A3Error as error:
        damage.append(str(error))
    return {**manifest, "config": decoder_config(config), "wrapper": wrapper_of(config)}, damage


def loading(wrapper: Wrapper | None) -> Json:
    """Return the class that loads an export, and what it calls tensors of the files: pairs of prefixes."""
    if wrapper is None:
        return {"auto_class": "AutoModelForCausalLM", "renames": []}
    return {"auto_class": wrapper.auto_class, "renames": wrapper.renames}


def open_manifest(path: Path) -> Json:
    """Read the manifest. Raises A3Error if it was altered or lacks needed entries; other entries may differ."""
    manifest = read_json(path)
    lacking = [key for key in ("solution", "files") if not isinstance(manifest.get(key), dict)]
    if manifest.get("dtype") not in get_args(ExportSettings.model_fields["dtype"].annotation):
        lacking.append("dtype")
    if lacking:
        raise A3Error(f"{path} has no {', '.join(lacking)}; run a3 export again")
    return unaltered(manifest, path, "export again")


def check_config(manifest: Json, damage: list[str]) -> tuple[Json, dict[str, list[int]]]:
    """Check that config.json has the manifest's sizes; return the check and the expected tensor shapes by name."""
    try:
        sizes, shapes = expected_shapes(manifest["config"])
        if wrapper := manifest["wrapper"]:
            shapes = {wrapper.held_name(name): shape for name, shape in shapes.items()}
    except (A3Error, ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        why = damage or [f"config.json does not describe a model: {error}"]
        return check("config", "failed", "; ".join(why)), {}
    if damage:
        return check("config", "failed", "; ".join(damage)), shapes
    if [asdict(size) for size in sizes] != manifest["solution"].get("sizes"):
        return check("config", "failed", f"config.json has other sizes than {MANIFEST}"), shapes
    return check("config", "passed", f"{len(sizes)} layers of the sizes in {MANIFEST}"), shapes


def expected_shapes(config: Json) -> tuple[list[LayerSizes], dict[str, list[int]]]:
    """Return each layer's sizes and the shapes of linear weights and embedding, from config.json alone."""
    family, config = family_of(config.get("model_type")), usual_entries(config)
    check_sizes(config)
    shape = read_shape(SimpleNamespace(**config))
    sizes = own_sizes(config["per_layer_config"], shape) if "per_layer_config" in config else shape.sizes
    shapes = {family.embedding + ".weight": [config["vocab_size"], config["hidden_size"]]}
    for layer, size in enumerate(sizes):
        of_layer = shape.linear_shapes(size)
        for role in of_layer:
            wanted = list(stored_shape(family, role, of_layer))
            shapes |= dict.fromkeys(weight_names(family, layer, role, shape.experts), wanted)
        if shape.fitted_norms:
            shapes |= {family.tensor(layer, role): [size.qk] for role in HEAD_NORM_ROLES}
    return sizes, shapes


def own_sizes(layers: Json, shape: ModelShape) -> list[LayerSizes]:
    """Return the sizes in `per_layer_config`. Raises A3Error unless each layer has some, none above the source's."""
    keys = ("qk_head_dim", "v_head_dim", "intermediate_size")
    ordered = sorted(layers.items(), key=lambda item: int(item[0]))
    sizes = [LayerSizes(*(index(own[key]) for key in keys)) for _, own in ordered]
    full = shape.full_sizes
    if len(sizes) != shape.layers or any(s.qk > full.qk or s.ov > full.ov or s.mlp > full.mlp for s in sizes):
        raise A3Error("config.json: per_layer_config does not fit the other entries")
    return sizes


def code_of(config: Json) -> Json:
    """Return the hashes of the files that may run as part of a per-layer export, and the auto_map of their classes."""
    family = family_of(config.get("model_type"))
    return {
        "files": {file.name: hash_file(file) for file in shipped_files(family.model_type)},
        "auto_map": auto_map(family),
    }


def choose_tokens(work: Work, config: Json, reference: "Reference | Json") -> torch.Tensor:
    """Return the first tokens of two calibration blocks, or random ones without a work folder: `[2, T]`."""
    context, vocabulary = (usual_entries(config).get(key) for key in ("max_position_embeddings", "vocab_size"))
    length = min(LENGTH, context) if isinstance(context, int) and context > 1 else LENGTH
    if isinstance(reference, Reference):
        blocks: torch.Tensor = read_tensors(work.tokens, "run a3 calibrate --overwrite")["tokens"]
        return blocks[:PROMPTS, :length].contiguous()
    generator = torch.Generator().manual_seed(0)
    highest = vocabulary if isinstance(vocabulary, int) and 0 < vocabulary <= LARGEST else 1
    return torch.randint(highest, (PROMPTS, length), generator=generator)


def run_checker(request: Json, folder: Path) -> list[Json]:
    """Run `checker.py` in a process without a3 and return its checks; checks that it did not reach are failed."""
    (folder / "request.json").write_text(json.dumps(request), "utf-8")
    # Python imports first from a script's own folder, whose modules must not hide others. More isolation (-I) would
    # hide packages of PYTHONPATH and of the user's site-packages.
    script = shutil.copyfile(CHECKER, folder / "checker.py")
    environment = {
        **os.environ,
        "PYTHONUTF8": "1",  # in any locale: libraries refuse names that Python could not decode
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),  # where transformers copies code that it runs
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, str(script), str(folder / "request.json")]
    checks = []
    with (folder / "stderr").open("w+b") as stderr:
        with running(command, environment, stderr.fileno()) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"name"'):
                    checks.append(json.loads(line))
                    log.info("%s: %s", checks[-1]["name"], checks[-1]["outcome"])
        stderr.seek(0)
        said = stderr.read().decode("utf-8", "replace")
    log.debug("%s", said)
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    why = f"the checking process ended with code {process.returncode}: {last}"
    return [*checks, *(check(name, "failed", why) for name in CHECKED_APART[len(checks) :])]


def as_utf8(path: Path) -> str:
    """Return a path as a process in UTF-8 mode decodes it, which may differ from this process's locale."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


@contextmanager
def running(command: list[str], environment: dict[str, str], stderr: int) -> Iterator["subprocess.Popen[str]"]:
    """Run a process that ends with the block at the latest."""
    with subprocess.Popen(  # noqa: S603, our own script
        command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8"
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


class Reference:
    """The source and the solution of an export."""

    def __init__(self, model: Model, solution: Solution, progress: Progress) -> None:
        self.model, self.solution, self.progress = model, solution, progress

    def logits(self, tokens: torch.Tensor, machine: Machine, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits `[B, T, V]` in float64, and in `machine.dtype` with weights rounded to the export's dtypes."""
        slots = [self.solution.slots(layer) for layer in range(self.model.shape.layers)]
        exact = FullSizeReference(self.model, Machine(machine.device, torch.float64), self.solution.layer, slots)
        rounded = FullSizeReference(
            self.model,
            machine,
            self.solution.layer,
            slots,
            rounded=lambda stored: stored if dtype == "source" else getattr(torch, dtype),
        )
        return reference_logits(exact, rounded, slots, tokens, self.progress)


def open_reference(work: Work, manifest: Json, progress: Progress = silent) -> Reference | Json:
    """Return the export's source and solution, or the check's outcome if missing (skipped) or damaged (failed)."""
    if not work.solutions():
        why = f"{work.folder} has no solution; --work names the folder that the export was made from"
        return check("reference", "skipped", why)
    named = manifest["solution"].get("sha256")
    if not named:
        return check("reference", "failed", f"{MANIFEST} does not name the solution that it was made from")
    try:
        of_export = find_solution(work, named)
        if of_export is None:
            why = f"{work.folder} holds another solution than the one that the export was made from"
            return check("reference", "skipped", why)
        # A folder in use fails too: the solution exists and was not compared; rerun the command later.
        with work.locked():
            calibration, solution = read_solution(of_export, progress)
            check_hash(work.tokens, calibration.tokens_hash, "run a3 calibrate --overwrite")
            return Reference(open_calibrated_source(work, calibration), solution, progress)
    except A3Error as error:
        return check("reference", "failed", str(error))


def check_reference(
    reference: Reference | Json, manifest: Json, machine: Machine, folder: Path, *, required: bool
) -> Json:
    """Check that the export's logits equal the reference's within rounding."""
    logits = folder / "logits.safetensors"
    if not isinstance(reference, Reference):
        return {**reference, "outcome": "failed"} if required else reference
    if not logits.is_file():
        return check("reference", "failed" if required else "skipped", "needs forward")
    log.info("streaming the full-size reference")
    try:
        exact, rounded = reference.logits(
            load_file(folder / "tokens.safetensors")["tokens"], machine, manifest["dtype"]
        )
    except A3Error as error:
        return check("reference", "failed", str(error))
    return judge(load_file(logits)["logits"], exact, rounded)


def judge(logits: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> Json:
    """Check that the distance from `exact` is at most three times that of `rounded`, plus float32 rounding."""
    if logits.shape != exact.shape:
        return check("reference", "failed", f"logits are {list(logits.shape)}, the reference's {list(exact.shape)}")
    difference, rounding = (distance(each, exact) for each in (logits, rounded))
    tolerance = MARGIN * rounding + FLOOR
    return {
        **check(
            "reference",
            "passed" if difference <= tolerance else "failed",  # a NaN fails
            f"relative difference {difference:.2e}, tolerance {tolerance:.2e} (rounding alone: {rounding:.2e})",
        ),
        "difference": difference,
        "tolerance": tolerance,
        "rounding": rounding,
    }


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def check(name: str, outcome: str, detail: str) -> Json:
    return {"name": name, "outcome": outcome, "detail": detail}


def cases(result: Json) -> list[Case]:
    return [Case(result["model"], each["name"], each["outcome"], each["detail"]) for each in result["checks"]]


def raise_for_failures(result: Json) -> None:
    """Raise CheckFailed naming the checks that failed."""
    failed = [each for each in result["checks"] if each["outcome"] == "failed"]
    if failed:
        raise CheckFailed(
            f"{result['model']}: {len(failed)} of {len(result['checks'])} checks failed: "
            + "; ".join(f"{each['name']} ({each['detail']})" for each in failed)
        )
