"""The model card of an export, with what a reader needs to know where it came from and how to load it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from a3cli.checkpoint import Checkpoint
from a3cli.families import ModelShape
from a3cli.model import Model
from a3cli.work import Json

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
Removed: {{ removed }} of the decoder's linear weights (asked: {{ asked }}).

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto"{{ remote_code }})
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Loads with {{ loaders }}. {{ rope }}.

## How it was made

Calibrated on {{ tokens }} tokens ({{ blocks[0] }} blocks of {{ blocks[1] }}) of {{ datasets }}. Settings,
versions and the hash of every file are in `a3_manifest.json`.

```
{{ calibration }}
a3 solve {{ solve_options }}
a3 export OUT
```
"""


def model_card(model: Model, manifest: Json) -> str:
    """The README.md of an export, from its manifest."""
    source, solution, calibration = model.source, manifest["solution"], manifest["calibration"]
    request = calibration["request"]
    texts = [part["text"] for part in request["merged"]] if "merged" in request else [request["text"]]
    base = source.name if source.revision else Path(source.name).name  # a local path says nothing to others
    card = ModelCard.from_template(
        ModelCardData(**card_metadata(source)),
        template_str=TEMPLATE,
        title=f"{Path(source.name).name}, {100 * solution['budget_reached']:.0f} % removed",
        base=base,
        rows=figures(model.shape, solution),
        removed=f"{100 * solution['budget_reached']:.2f} %",
        asked="per component" if solution["budget_asked"] is None else f"{100 * solution['budget_asked']:g} %",
        remote_code=", trust_remote_code=True" if solution["shape"] == "per-layer" else "",
        loaders=manifest["loads_with"],
        rope=describe_rope(model.shape, solution),
        tokens=f"{calibration['tokens']:,}",
        blocks=calibration["blocks"],
        datasets=" and ".join(f"`{name_of(text)}`" for text in texts),
        calibration="\n".join(calibrate_commands(base, texts)),
        solve_options=solve_options(solution["request"]["settings"]),
    )
    return str(card.content).rstrip() + "\n"


def name_of(text: Json) -> str:
    """A dataset by the name that says something elsewhere: of a local path the last part."""
    dataset: str = text["dataset"]
    return dataset if "/" not in dataset else Path(dataset).name


def calibrate_commands(base: str, texts: list[Json]) -> list[str]:
    """The commands that make the statistics again; several calibrations were merged."""
    works = [f"work-{i + 1}" for i in range(len(texts))] if len(texts) > 1 else []
    commands = [
        f"a3 calibrate {base} --dataset {name_of(text)} --samples {text['samples']} --seq-len {text['seq_len']} "
        f"--seed {text['seed']}" + (f" --work {works[i]}" if works else "")
        for i, text in enumerate(texts)
    ]
    return [*commands, f"a3 stats merge {' '.join(works)} --into a3-work"] if works else commands


def card_metadata(source: Checkpoint) -> Json:
    """Hub metadata: base model, and the source card's licence carried over."""
    metadata: Json = {"library_name": "transformers", "tags": ["a3", "compressed"], "pipeline_tag": "text-generation"}
    if source.revision:
        metadata["base_model"] = source.name
    readme = source.folder / "README.md"
    if readme.is_file():
        try:
            found = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, OSError, HfHubHTTPError):
            return metadata  # a card that does not parse has no licence to carry
        for key in ("license", "license_name", "license_link", "language"):
            if found.get(key):
                metadata[key] = found[key]
    return metadata


def figures(shape: ModelShape, solution: Json) -> list[tuple[str, str, str]]:
    """The before/after rows of the card."""
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
        ("KV cache, bytes a token", "kv_bytes_per_token"),
        ("prefill FLOPs a token", "prefill_flops_per_token"),
    ):
        rows.append((label, f"{solution[key]['before']:,}", f"{solution[key]['after']:,}"))
    return rows


def spread(values: list[int]) -> str:
    """One size, or the range of a size that differs by layer, with its mean."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, mean {sum(values) / len(values):,.1f}"


def describe_rope(shape: ModelShape, solution: Json) -> str:
    if all(sizes["qk"] == shape.head_dim for sizes in solution["sizes"]):
        return "RoPE as in the source"
    if solution["shape"] == "per-layer":
        return "Each layer has its own RoPE slots (`rope_slots` in config.json)"
    return f"RoPE has {len(solution['rope_slots'])} rotated pairs of {shape.head_dim // 2}"


def solve_options(settings: Json) -> str:
    """The command-line options that give these settings again."""
    options = []
    named = ("budget", "attention_budget", "mlp_budget", "method", "shape", "context", "head_multiple", "mlp_multiple")
    for key in (*named, "ridge"):
        if settings[key] is not None:
            options.append(f"--{key.replace('_', '-')} {settings[key]}")
    if settings["sequential"]:
        options.append("--sequential")
    return " ".join([*options, f"--components {','.join(settings['components'])}"])
