"""The model card of an export: where it comes from and how to load it."""

import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import ModelShape
from a3cli.models.model import Model
from a3cli.report.long_range import solution_warnings
from a3cli.settings import LOSSES, SolveSettings
from a3cli.settings.options import command_words
from a3cli.work.escape import code_span, markdown, printable
from a3cli.work.files import Json

# A Hub id of `--dataset`, optionally with a configuration; and the suffixes of local files.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
TEXT_FILES = (".jsonl", ".parquet", ".txt")
FILES_NAMED = 5  # files of a folder listed on a card; the manifest lists all
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A smaller version of `{{ base }}`, made in closed form and without training by
[A³](https://arxiv.org/abs/2505.12942): smaller heads and a smaller MLP, the same number of matrix products.

| | before | after |
|---|---|---|
{% for row in rows -%}
| {{ row[0] }} | {{ row[1] }} | {{ row[2] }} |
{% endfor %}
Removed: {{ removed }} of the decoder's linear weights (asked: {{ asked }}). Predicted loss, {{ unit }},
summed over layers: {{ predicted }}.
{% if measured %}

Measured with `a3 eval`:

| text | perplexity of the source | perplexity | KL, nats per token | top-1 agreement |
|---|---|---|---|---|
{% for row in measured -%}
| {{ row | join(" | ") }} |
{% endfor %}
{%- endif %}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto"{{ remote_code }})
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

| runtime | loads it | note |
|---|---|---|
{% for row in runtimes -%}
| {{ row.runtime }} | {{ row.loads }} | {{ row.note }} |
{% endfor %}
{{ rope }}
{% for warning in warnings %}

**Warning.** {{ warning }}.
{% endfor %}

## How it was made

Base model: `{{ base }}`{{ revision }}. Licence: {{ licence }}. Method: {{ method }}. Calibrated on {{ tokens }} tokens
({{ blocks[0] }} blocks of {{ blocks[1] }}) of {{ datasets }}. Settings, versions and the hash of every file are in
`a3_manifest.json`.

````
{{ commands }}
````
"""


def model_card(model: Model, manifest: Json) -> str:
    """Return the README.md of an export, from its manifest."""
    source, solution, calibration = model.source, manifest["solution"], manifest["calibration"]
    base = public_name(manifest["source"])
    metadata = card_metadata(source)
    commands = (
        *calibrate_commands(base, source.revision, calibration),
        solve_command(solution["request"]["settings"]),
        export_command(manifest),
    )
    card = ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=TEMPLATE,
        title=f"{markdown(Path(source.name).name)}, {100 * solution['budget_reached']:.0f} % removed",
        base=code_span(base),
        revision=f" at `{source.revision}`" if source.revision else "",
        licence=markdown(", ".join(str(metadata[k]) for k in ("license", "license_name") if k in metadata))
        or "not stated",
        method=describe_method(solution),
        predicted=", ".join(f"{name.upper()} {value:.4g}" for name, value in solution["predicted_loss"].items()),
        unit=LOSSES[solution["request"]["settings"]["sensitivity"]],
        measured=[measured_row(each) for each in manifest.get("measured") or []],
        rows=figures(model.shape, solution),
        removed=f"{100 * solution['budget_reached']:.2f} %",
        asked="per component" if solution["budget_asked"] is None else f"{100 * solution['budget_asked']:g} %",
        remote_code=", trust_remote_code=True" if solution["shape"] == "per-layer" else "",
        runtimes=manifest["runtimes"],
        rope=" ".join(filter(None, (describe_rope(model.shape, solution), describe_context(solution)))),
        tokens=f"{calibration['tokens']:,}",
        blocks=calibration["blocks"],
        datasets=describe_texts(calibration, quoted=lambda name: f"`{code_span(name)}`"),
        warnings=[markdown(warning) for warning in solution_warnings(solution)],
        commands="\n".join(commands),
    )
    return str(card.content).rstrip() + "\n"


def public_dataset(dataset: str) -> str:
    """Return the public name of a data set: a Hub id, or the last part of a local path."""
    path = Path(dataset)
    on_hub = HUB_ID.fullmatch(dataset) and path.suffix not in TEXT_FILES and not path.exists()
    return dataset if on_hub else path.name


def public_request(request: Json) -> Json:
    """Return a calibration's request, or a part of a merged one, without local paths."""
    named = {**request, "text": {**request["text"], "dataset": public_dataset(request["text"]["dataset"])}}
    return named | {"merged": [public_request(part) for part in request["merged"]]} if "merged" in request else named


def card_metadata(source: Checkpoint) -> Json:
    """Return Hub metadata: the base model and the licence of the source's card."""
    metadata: Json = {"library_name": "transformers", "tags": ["a3", "compressed"], "pipeline_tag": "text-generation"}
    if source.revision:
        metadata["base_model"] = source.name
    readme = source.folder / "README.md"
    if readme.is_file():
        try:
            found = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, OSError, HfHubHTTPError):
            return metadata  # an unparsable card has no licence
        for key in ("license", "license_name", "license_link", "language"):
            if found.get(key):
                metadata[key] = found[key]
    return metadata


def describe_method(solution: Json) -> str:
    """Return method and shape in a few words."""
    settings = solution["request"]["settings"]
    name = "A³ as published" if settings["method"] == "paper" else "A³ with RoPE slots and refits"
    corrected = ", corrected in a second sweep" if settings["sequential"] else ""
    return f"{name} (`--method {settings['method']} --shape {settings['shape']}`){corrected}"


def measured_row(found: Json) -> tuple[str, ...]:
    """Return one data set's figures as a row of the card."""
    figures = [
        "–" if found[key] is None else format(found[key], form)
        for key, form in (("source_perplexity", ".3f"), ("perplexity", ".3f"), ("kl", ".4f"), ("top1_agreement", ".1%"))
    ]
    return (f"`{code_span(public_dataset(found['dataset']))}`, blocks of {found['seq_len']}", *figures)


def figures(shape: ModelShape, solution: Json) -> list[tuple[str, str, str]]:
    """Return the before/after rows of the card."""
    rows = [
        (label, f"{full:,}", spread([sizes[key] for sizes in solution["sizes"]]))
        for label, key, full in (
            ("query and key head size", "qk", shape.head_dim),
            ("value head size", "ov", shape.head_dim),
            ("MLP width", "mlp", shape.intermediate_size),
        )
    ]
    for label, key in (
        ("parameters", "parameters"),
        ("KV cache, bytes per token", "kv_bytes_per_token"),
        ("prefill FLOPs per token", "prefill_flops_per_token"),
    ):
        rows.append((label, f"{solution[key]['before']:,}", f"{solution[key]['after']:,}"))
    return rows


def spread(values: list[int]) -> str:
    """Return one size, or its range and mean if it differs by layer."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, mean {sum(values) / len(values):,.1f}"


def describe_rope(shape: ModelShape, solution: Json) -> str:
    if all(sizes["qk"] == shape.head_dim for sizes in solution["sizes"]):
        return "RoPE as in the source."
    if solution["shape"] == "per-layer":
        return "Each layer has its own RoPE slots (`rope_slots` in config.json)."
    slots, pairs, turning = solution["rope_slots"], shape.head_dim // 2, shape.turning_pairs
    if turning == pairs:
        return f"RoPE has {len(slots)} rotated pairs of {pairs}."
    turned = sum(slot < turning for slot in slots)
    still = f"{len(slots) - turned} of {pairs - turning}"
    return f"RoPE has {turned} rotated pairs of {turning}, and passes the dims of {still} others through."


def describe_context(solution: Json) -> str:
    """Return a sentence about `--context`, empty if it was not given."""
    if (context := solution["request"]["settings"]["context"]) is None:
        return ""
    return f"Made for texts of up to {context:,} tokens, which is `max_position_embeddings` in config.json."


def public_name(source: Json) -> str:
    """Return a Hub id, or the name of a folder without its path."""
    return str(source["model"]) if source["revision"] else Path(str(source["model"])).name


def describe_texts(calibration: Json, quoted: Callable[[str], str]) -> str:
    """Describe what a calibration, or each of its merged parts, has read: data set, files, rows."""
    request = calibration["request"]
    parts = request.get("merged") or [{**request, "text_read": calibration.get("text_read")}]
    return " and ".join(describe_text(part, quoted) for part in parts)


def describe_text(part: Json, quoted: Callable[[str], str]) -> str:
    name, files = public_dataset(part["text"]["dataset"]), list(part.get("text_files") or {})
    notes = []
    if files and files != [name]:
        more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
        notes.append(f"read: {', '.join(map(quoted, files[:FILES_NAMED]))}{more}")
    if (read := part.get("text_read")) and read["rows"]:
        notes.append(f"{read['rows']:,} rows, {read['skipped']:,} without text skipped")
    return quoted(name) + (f" ({'; '.join(notes)})" if notes else "")


def calibrate_commands(base: str, revision: str | None, calibration: Json) -> list[str]:
    """Return the commands that reproduce these statistics bit for bit, also for a merged calibration."""
    request = calibration["request"]
    parts = request.get("merged") or [{**request, "made_with": calibration.get("made_with")}]
    works = [f"work-{i + 1}" for i in range(len(parts))] if len(parts) > 1 else [None]
    commands = []
    for part, work in zip(parts, works, strict=True):
        options: Json = {"revision": revision} | part["text"] | {"dataset": public_dataset(part["text"]["dataset"])}
        options |= {key: part.get(key, request[key]) for key in ("device", "batch_size")}
        options |= {key: request[key] for key in ("dtype", "mlp_stats", "trust_remote_code")}
        divided, alike = division(part.get("made_with") or [])
        options |= divided
        options["full_check"] = bool(request["source"].get("in_full"))
        if not alike:
            commands.append(
                "# Not all layers were calibrated with these blocks per batch and processes: they may differ"
            )
        commands.append(command("calibrate", base, {**options, "work": work}))
    merging = [f"a3 stats merge {' '.join(work for work in works if work)} --into a3-work"]
    return commands if len(parts) == 1 else commands + merging


def division(made_with: list[Json]) -> tuple[Json, bool]:
    """Return batch size and processes of most layers, and whether all layers had the same.

    Floating-point sums depend on them, and `--batch-size auto` depends on the free memory.
    """
    if not made_with:
        return {}, True
    counts = Counter((each["batch_size"], each["processes"]) for each in made_with)
    ((batch_size, processes), _), *others = counts.most_common()
    return {"batch_size": batch_size, "num_processes": processes if processes > 1 else None}, not others


def solve_command(settings: Json) -> str:
    """Return the command for these settings, without options that have their default."""
    without = set()
    if not settings["sequential"]:
        without |= {"refit_rounds"}
    if settings["sensitivity"] != "probe":
        without |= {"probe_blocks", "probe_points"}
        if not settings["sequential"]:
            without |= {"dtype", "batch_size"}
    defaults = {name: field.default for name, field in SolveSettings.model_fields.items()}
    options = {key: value for key, value in settings.items() if key not in without or value != defaults[key]}
    return command("solve", None, options)


def export_command(export: Json) -> str:
    return command("export", "OUT", {key: export.get(key) for key in ("dtype", "max_shard_size")})


def command(name: str, argument: str | None, options: Json) -> str:
    """Return a shell command; names with special characters are quoted and escaped."""
    return " ".join(shlex.quote(printable(word)) for word in ("a3", *command_words(name, argument, options)))
