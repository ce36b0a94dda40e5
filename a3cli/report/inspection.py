"""Inspect a work folder at any stage, or an export, and warn. Changes nothing and takes no lock.

A work folder has its statistics and calibration text; an export has only its manifest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from a3cli.errors import A3Error
from a3cli.methods.inputs import check_statistics
from a3cli.models.checkpoint import Checkpoint, resolve_model
from a3cli.models.families import family_of
from a3cli.report.long_range import solution_warnings
from a3cli.report.manifest import MANIFEST, read_export_manifest
from a3cli.report.measured import Measured
from a3cli.settings import COMPONENTS, Component
from a3cli.solvers.linalg import effective_rank
from a3cli.solvers.moments import gram_blocks, unpack_upper
from a3cli.text.blocks import load_tokenizer, tokenizer_fingerprint
from a3cli.text.tokens import describe_blocks, describe_text
from a3cli.work.files import Json, check_hash, hash_json, open_tensors, read_json, read_tensors
from a3cli.work.folder import Work
from a3cli.work.manifests import SourceRecord
from a3cli.work.sealed import name_differences, read_manifest

ENOUGH_TOKENS = 10  # times the dimension of a Gram matrix
NEAR_SINGULAR = 1e8  # condition; above it, the smallest eigenvalues are rounding of float32 sums
SINGULAR = 1e-10  # of the largest eigenvalue: the solvers' default floor
WIDEST_SPECTRUM = 2048  # largest width whose eigenvalues are all computed: wider ones take a minute per layer
SOURCE_REMEDY = "run a3 calibrate on the source again"
TITLES: dict[Component, str] = {"qk": "QK", "ov": "OV", "mlp": "MLP"}


@dataclass(frozen=True)
class Dimensions:
    """H, K, h, I; and, if the source or the export is available, d, the vocabulary, the bytes of a weight, and whether
    the MLP has a gate.
    """

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    hidden: int | None = None
    vocabulary: int | None = None
    item: int | None = None
    gated: bool = True

    def of_gram(self, component: Component) -> int:
        """Return the size of the largest inverted matrix: all heads together for the refit of the output projection."""
        return {"qk": self.head_dim, "ov": self.heads * self.head_dim, "mlp": self.intermediate}[component]

    def bytes(self, component: Component, size: int) -> int | None:
        """Return the bytes of a component's weights in one layer, without biases."""
        if self.hidden is None or self.item is None:
            return None
        rows = (3 if self.gated else 2) if component == "mlp" else self.heads + self.kv_heads
        return rows * size * self.hidden * self.item


def describe(path: Path) -> Json:
    """Return the folder's stage, source, settings, hashes, layers and warnings. Raises A3Error for other folders."""
    if (path / MANIFEST).is_file():
        return describe_export(path)
    work = Work(path)
    if work.calibration_manifest.is_file() or work.calibration_progress.is_file():
        return describe_work(work)
    raise A3Error(f"{path} is neither a work folder with a calibration nor an a3 export; give one of these")


def describe_export(folder: Path) -> Json:
    manifest = read_export_manifest(folder / MANIFEST).plain()
    path = folder / "config.json"
    config = read_json(path)
    heads, kv = count_in(config, "num_attention_heads", path), "num_key_value_heads"
    solution, calibration = manifest["solution"], manifest["calibration"]
    full = solution["full_size"]
    dimensions = Dimensions(
        heads=heads,
        kv_heads=heads if config.get(kv) is None else count_in(config, kv, path),
        head_dim=full["qk"],
        intermediate=full["mlp"],
        hidden=count_in(config, "hidden_size", path),
        vocabulary=count_in(config, "vocab_size", path),
        item=round(solution["bytes"]["before"] / solution["parameters"]["before"]),
        gated=family_of(config.get("model_type")).gated,
    )
    check_hash(path, manifest["files"].get(path.name, ""), "run a3 export again")
    layers = describe_layers(dimensions, calibration["tokens"], solution, [])
    return {
        "path": str(folder),
        "kind": "export",
        "stage": "exported",
        "source": manifest["source"],
        "calibration": calibration,
        "text": None,
        "solution": solution,
        "layers": layers,
        "export": {key: manifest[key] for key in ("dtype", "max_shard_size", "runtimes", "files")},
        "measured": [as_measured(each) for each in manifest["measured"]],
        "versions": manifest["versions"],
        "warnings": warnings(layers, None, solution),
    }


def count_in(config: Json, key: str, path: Path) -> int:
    """Return the positive number at `key` of config.json. Raises A3Error if it is anything else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise A3Error(f"{path}: {key} is {value!r}, not a positive number; run a3 export again")
    return value


def describe_work(work: Work) -> Json:
    under_way = not work.calibration_manifest.is_file()
    path = work.calibration_progress if under_way else work.calibration_manifest
    calibration = read_manifest(path, "run a3 calibrate --overwrite")
    check_hash(work.tokens, calibration["tokens_hash"], "run a3 calibrate --overwrite")
    blocks = read_tensors(work.tokens, "run a3 calibrate --overwrite")["tokens"]
    recorded = read_source(work, calibration["request"]["source"]).plain() if work.source.is_file() else {}
    source = open_source(recorded)
    if source is not None:
        check_source(source, work, calibration)
    solution = None
    if work.solution_manifest.is_file():
        solution = read_manifest(work.solution_manifest, "run a3 solve --overwrite")
    stale = solution is not None and solution["request"]["calibration"] != calibration["sha256"]
    text = describe_calibration_text(blocks, source)
    dimensions, health = describe_statistics(work, calibration["layers"], source)
    layers = describe_layers(dimensions, blocks.numel(), None if stale else solution, health) if dimensions else []
    found = warnings(layers, text, None if stale else solution)
    if stale:
        found.append(f"{work.solution_manifest} was solved from another calibration: run a3 solve --overwrite")
    if source is None:
        found.append("the source was not found: bytes and token texts are missing")
    return {
        "path": str(work.folder),
        "kind": "work",
        "stage": "calibrating" if under_way else "solved" if solution and not stale else "calibrated",
        "source": {key: recorded.get(key) for key in ("model", "revision", "fingerprint")},
        "calibration": {**calibration, "tokens": blocks.numel(), "blocks": list(blocks.shape)},
        "text": text,
        "solution": None if stale else solution,
        "layers": layers,
        "export": None,
        "measured": measured_in(work, None if stale else solution),
        "versions": calibration.get("versions"),
        "warnings": found,
    }


def read_source(work: Work, fingerprint: Json) -> SourceRecord:
    """Read where a calibration's checkpoint is. Raises A3Error if source.json was altered or is of another model."""
    recorded = SourceRecord.read(work.source, SOURCE_REMEDY)
    if recorded.fingerprint.plain() != fingerprint:
        raise A3Error(
            f"{work.source} is of another model ({recorded.model}) than the calibration in {work.calibration}; "
            f"{SOURCE_REMEDY}"
        )
    return recorded


def measured_in(work: Work, solution: Json | None) -> list[Json]:
    """Return the figures that a3 run measured for this solution's export, if that export still exists."""
    if solution is None or not work.evaluation.is_file():
        return []
    evaluation = read_manifest(work.evaluation, "run a3 run --overwrite")
    request = evaluation["request"]
    try:
        manifest = read_export_manifest(Path(request["settings"]["model"]) / MANIFEST)
        exported = hash_json(manifest.plain()) == request["export"]
        of_this = exported and manifest.solution.sha256 == solution["sha256"]
        return [as_measured(each) for each in evaluation["result"]["datasets"]] if of_this else []
    except (A3Error, ValidationError):  # another model was measured, the export was removed, or a figure is not finite
        return []


def as_measured(figures: Json) -> Json:
    return Measured.model_validate(figures).model_dump()


def open_source(recorded: Json) -> Checkpoint | None:
    """Open the source if it is on this machine; a Hub id is looked up only in the cache.

    Raises A3Error for a local folder with a damaged checkpoint.
    """
    model, revision = str(recorded.get("model")), recorded.get("revision")
    if Path(model).is_dir():
        return resolve_model(model, follow_symlinks=recorded.get("follow_symlinks") is True)
    try:
        return resolve_model(model, revision, cached_only=True)
    except A3Error:
        return None


def check_source(source: Checkpoint, work: Work, calibration: Json) -> None:
    """Check that weights, configuration and tokenizer are those of the calibration. Raises A3Error."""
    request = calibration["request"]
    found = {**source.fingerprint(), "tokenizer": tokenizer_fingerprint(source.folder)}
    expected = {**{key: request["source"].get(key) for key in found}, "tokenizer": request["tokenizer"]}
    if differs := name_differences(expected, found):
        raise A3Error(
            f"{source.name} is not the checkpoint of {work.calibration} (differs in {differs}); "
            "restore the source, or run a3 calibrate again"
        )


def describe_calibration_text(blocks: torch.Tensor, source: Checkpoint | None) -> Json:
    try:
        tokenizer = load_tokenizer(source.folder) if source else None
    except A3Error:
        tokenizer = None
    if tokenizer is None or source is None or not isinstance(source.config.get("vocab_size"), int):
        return describe_blocks(blocks)
    return describe_text(blocks, tokenizer, source.config["vocab_size"])


def describe_statistics(
    work: Work, hashes: Sequence[str], source: Checkpoint | None
) -> tuple[Dimensions | None, list[dict[Component, Json]]]:
    """Return the dimensions of the finished layers' statistics, and the health of their spectra."""
    health, dimensions = [], None
    for layer, expected in enumerate(hashes):
        check_hash(work.statistics(layer), expected, "run a3 calibrate --overwrite")
        with open_tensors(work.statistics(layer), "run a3 calibrate --overwrite") as file:
            heads, head_dim, _ = file.get_slice("q_gram").get_shape()
            dimensions = Dimensions(
                heads=heads,
                kv_heads=file.get_slice("k_gram").get_shape()[0],
                head_dim=head_dim,
                intermediate=file.get_slice("mlp_energy").get_shape()[0],
                hidden=source.config.get("hidden_size") if source else None,
                item=source.dtype.itemsize if source else None,
                gated=source is None or family_of(source.config.get("model_type")).gated,
            )
            health.append(layer_health(file, dimensions, layer))
    return dimensions, health


def layer_health(file: Any, dimensions: Dimensions, layer: int) -> dict[Component, Json]:
    """Return effective rank and condition of one layer's Gram matrices, for the worst head."""

    def sums(name: str) -> torch.Tensor:
        found: torch.Tensor = file.get_tensor(name)
        check_statistics(found, name, layer)
        return found

    width = dimensions.heads * dimensions.head_dim
    outputs = unpack_upper(sums("o_gram"), width)
    attention = spectrum_health(gram_blocks(outputs, dimensions.heads))
    if width <= WIDEST_SPECTRUM:  # used by the refit of the output projection
        attention |= conditions(outputs[None])
    energy = sums("mlp_energy").double()
    mlp: Json = {
        "effective_rank": effective_rank(energy).item(),
        "dead": int((energy <= SINGULAR * energy.max()).sum()),
        "condition": None,
        "singular": None,
    }
    if "mlp_gram" in file.keys() and dimensions.intermediate <= WIDEST_SPECTRUM:  # noqa: SIM118, no dictionary
        gram = unpack_upper(sums("mlp_gram"), dimensions.intermediate)
        mlp |= conditions(gram[None])
    keys = sums("k_gram")
    scores = spectrum_health(keys) | conditions(torch.cat([sums("q_gram"), keys]))
    return {"qk": scores, "ov": attention, "mlp": mlp}


def conditions(grams: torch.Tensor) -> Json:
    """Return `spectrum_health` without the effective rank, which is computed from other matrices."""
    return {key: value for key, value in spectrum_health(grams).items() if key != "effective_rank"}


def spectrum_health(grams: torch.Tensor) -> Json:
    """Return mean effective rank, worst condition and number of rounding eigenvalues of Gram matrices `[n, h, h]`."""
    values = torch.linalg.eigvalsh(grams.double())
    least, largest = values.amin(-1), values.amax(-1)
    condition = torch.where(least > 0, largest / least, torch.inf).max().item()
    return {
        "effective_rank": effective_rank(values).mean().item(),
        "condition": condition if condition < 1 / SINGULAR else None,
        "singular": int((values <= SINGULAR * largest[:, None]).sum()),
    }


def describe_layers(
    dimensions: Dimensions, tokens: int, solution: Json | None, health: list[dict[Component, Json]]
) -> list[Json]:
    """Return each layer's components: size, loss, energy, ranks, tokens, damping, bytes; None if unknown."""
    count = len(solution["sizes"]) if solution else len(health)
    return [
        {
            "layer": layer,
            **{
                component: describe_component(
                    component, dimensions, tokens, solution, layer, health[layer][component] if health else {}
                )
                for component in COMPONENTS
            },
        }
        for layer in range(count)
    ]


def describe_component(
    component: Component, dimensions: Dimensions, tokens: int, solution: Json | None, layer: int, health: Json
) -> Json:
    full = dimensions.intermediate if component == "mlp" else dimensions.head_dim
    dimension = dimensions.of_gram(component)
    described: Json = {
        "full_size": full,
        "size": None,
        "predicted_loss": None,
        "energy_kept": None,
        "effective_rank": health.get("effective_rank"),
        "dimension": dimension,
        "tokens_per_dimension": tokens / dimension,
        "condition": health.get("condition"),
        "singular": health.get("singular"),
        "dead": health.get("dead"),
        "damping": None,
        "floored": None,
        "bytes": {"before": dimensions.bytes(component, full), "after": None},
    }
    return described | (solved_component(component, dimensions, solution, layer) if solution else {})


def solved_component(component: Component, dimensions: Dimensions, solution: Json, layer: int) -> Json:
    """Return a solution's entries for one layer's component."""
    size, found = solution["sizes"][layer][component], solution["per_layer"][layer]
    loss = loss_at(found["curves"][component], size)
    # Probed losses have other units.
    energy = found["energy"][component] if solution["request"]["settings"]["sensitivity"] == "residual" else None
    ranks = found["effective_rank"][component]
    settings = solution["request"]["settings"]
    floor = 0.0 if component == "mlp" else settings["eigenvalue_floor"]
    described = {
        "size": size,
        "predicted_loss": loss,
        "energy_kept": max(0.0, 1 - loss / energy) if energy and loss is not None else None,
        "effective_rank": sum(ranks) / len(ranks) if isinstance(ranks, list) else ranks,
        "damping": found["damping"].get(component, floor),
        "bytes": {
            "before": dimensions.bytes(component, solution["full_size"][component]),
            "after": dimensions.bytes(component, size),
        },
    }
    floored = found.get("floored_eigenvalues", {}).get(component)
    return described | ({"floored": sum(floored)} if floored is not None else {})


def loss_at(curve: Json, size: int) -> float | None:
    """Return the loss of an error curve at a size."""
    return float(curve["loss"][curve["size"].index(size)]) if size in curve["size"] else None


def warnings(layers: list[Json], text: Json | None, solution: Json | None = None) -> list[str]:
    """Return the warnings, one line each: long range, too few tokens, singular statistics, duplicated text."""
    found = solution_warnings(solution) if solution else []
    for component in COMPONENTS:
        found += component_warnings(component, [(each["layer"], each[component]) for each in layers])
    return found + (text_warnings(text) if text else [])


def component_warnings(component: Component, layers: list[tuple[int, Json]]) -> list[str]:
    title, found = TITLES[component], []
    if layers and (first := layers[0][1])["tokens_per_dimension"] < ENOUGH_TOKENS:
        found.append(
            f"{title}: {first['tokens_per_dimension']:.1f} tokens for each of the {first['dimension']:,} dimensions of "
            f"its statistics, fewer than {ENOUGH_TOKENS}: calibrate on {ENOUGH_TOKENS * first['dimension']:,} or more"
        )
    singular = [layer for layer, each in layers if each["singular"] or each["floored"]]
    if singular:
        found.append(
            f"{title}: singular statistics in {name_layers(singular)}: some directions never occur; they are damped"
        )
    near = [i for i, each in layers if i not in singular and (each["condition"] or 0) > NEAR_SINGULAR]
    if near:
        found.append(f"{title}: near-singular statistics in {name_layers(near)} (condition above {NEAR_SINGULAR:.0e})")
    if dead := [layer for layer, each in layers if each["dead"]]:
        found.append(f"{title}: channels that are always zero in {name_layers(dead)}: they cost nothing to remove")
    return found


def text_warnings(text: Json) -> list[str]:
    overlaps = text["overlapping_blocks"]
    identical = sum(each["share"] == 1 for each in overlaps)
    found = []
    if overlaps:
        blocks, first = len({each["block"] for each in overlaps}), overlaps[0]
        found.append(
            f"text: {blocks} of {text['blocks'][0]} calibration blocks repeat another one ({identical} wholly; first "
            f"block {first['block']}, {100 * first['share']:.0f} % of it in block {first['of']}): duplicates count "
            "twice; remove them, or use other text"
        )
    if text["distinct_tokens"] == 1:
        found.append("text: one single token, repeated")
    return found


def name_layers(layers: list[int]) -> str:
    """Format layer indices as `layer 3` or `layers 0–4, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    names = [str(first) if first == last else f"{first}–{last}" for first, last in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(names)}"
