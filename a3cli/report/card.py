"""The model card of an export: where it comes from and how to load it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from a3cli.models.checkpoint import Checkpoint
from a3cli.models.families import ModelShape
from a3cli.models.model import Model
from a3cli.report.commands import calibrate_commands, export_command, solve_command
from a3cli.report.figures import TITLES, compare, describe_budgets, percent
from a3cli.report.long_range import solution_warnings
from a3cli.report.manifest import ExportFacts
from a3cli.report.measured import Measured
from a3cli.report.names import describe_context, describe_texts, public_dataset, public_name
from a3cli.settings import COMPONENTS, LOSSES
from a3cli.work.escape import code_span, markdown
from a3cli.work.files import Json
from a3cli.work.manifests import Solution

# Rows of the before/after table.
LABELS = {
    "qk": "query and key head size",
    "ov": "value head size",
    "mlp": "MLP width",
    "parameters": "parameters",
    "kv_bytes_per_token": "KV cache, bytes per token",
    "prefill_flops_per_token": "prefill FLOPs per token",
}
FIGURES = (("source_perplexity", ".3f"), ("perplexity", ".3f"), ("kl", ".4f"), ("top1_agreement", ".1%"))
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A smaller version of `{{ base }}`, made in closed form and without training by
[A³](https://arxiv.org/abs/2505.12942): smaller heads and a smaller MLP, the same number of matrix products.

| | before | after |
|---|---|---|
{% for row in rows -%}
| {{ row.label }} | {{ row.before }} | {{ row.after }} |
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
from transformers import {{ auto_class }}, AutoTokenizer

model = {{ auto_class }}.from_pretrained("PATH", dtype="auto"{{ remote_code }})
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

| runtime | loads it | note |
|---|---|---|
{% for row in runtimes -%}
| {{ row.runtime }} | {{ row.loads }} | {{ row.note }} |
{% endfor %}
{% if as_type -%}
`config.json` says `{{ as_type }}`, not the source's `{{ source_type }}`: that class computes the same.
{% endif -%}
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


def model_card(model: Model, facts: ExportFacts) -> str:
    """Return the README.md of an export, from the facts of its manifest."""
    metadata = card_metadata(model.source)
    card = ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=TEMPLATE,
        **describe_provenance(model.source, facts, metadata),
        **describe_solution(model.shape, facts.solution),
        auto_class=model.wrapper.auto_class if model.wrapper else "AutoModelForCausalLM",
        as_type=facts.as_type,
        source_type=model.family.model_type,
        measured=[measured_row(each) for each in facts.measured],
        runtimes=facts.runtimes,
    )
    return str(card.content).rstrip() + "\n"


def describe_provenance(source: Checkpoint, facts: ExportFacts, metadata: Json) -> Json:
    """Return the template's content about source, licence, calibration text and commands."""
    calibration, settings = facts.calibration, facts.solution.request.settings
    base = public_name(facts.source.model, facts.source.revision)
    commands = (
        *calibrate_commands(base, source.revision, calibration.request, calibration.made_with),
        solve_command(settings),
        export_command(facts.dtype, facts.max_shard_size, facts.as_type),
    )
    licence = ", ".join(str(metadata[key]) for key in ("license", "license_name") if key in metadata)
    return {
        "title": f"{markdown(Path(source.name).name)}, {percent(facts.solution.budget_reached)} removed",
        "base": code_span(base),
        "revision": f" at `{source.revision}`" if source.revision else "",
        "licence": markdown(licence) or "not stated",
        "tokens": f"{calibration.tokens:,}",
        "blocks": calibration.blocks,
        "datasets": describe_texts(calibration, quoted=lambda name: f"`{code_span(name)}`"),
        "commands": "\n".join(commands),
    }


def describe_solution(shape: ModelShape, solution: Solution) -> Json:
    """Return the template's content about sizes, losses, method and RoPE."""
    losses = ((TITLES[component], getattr(solution.predicted_loss, component)) for component in COMPONENTS)
    return {
        "rows": compare(solution, LABELS),
        "removed": percent(solution.budget_reached, 2),
        "asked": describe_budgets(solution.request.settings),
        "method": describe_method(shape, solution),
        "predicted": ", ".join(f"{title} {value:.4g}" for title, value in losses),
        "unit": LOSSES[solution.request.settings.sensitivity],
        "remote_code": ", trust_remote_code=True" if solution.shape == "per-layer" else "",
        "rope": " ".join(filter(None, (describe_rope(shape, solution), describe_context(solution)))),
        "warnings": [markdown(warning) for warning in solution_warnings(solution)],
    }


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


def describe_method(shape: ModelShape, solution: Solution) -> str:
    """Return method and shape in a few words."""
    settings = solution.request.settings
    ours = "A³ with RoPE slots and refits" if shape.turning_pairs else "A³ with refits"
    name = "A³ as published" if settings.method == "paper" else ours
    corrected = ", corrected in a second sweep" if settings.sequential else ""
    return f"{name} (`--method {settings.method} --shape {settings.shape}`){corrected}"


def measured_row(measured: Measured) -> tuple[str, ...]:
    """Return one data set's figures as a row of the card."""
    values = ((getattr(measured, name), form) for name, form in FIGURES)
    figures = ("–" if value is None else format(value, form) for value, form in values)
    return (f"`{code_span(public_dataset(measured.dataset))}`, blocks of {measured.seq_len}", *figures)


def describe_rope(shape: ModelShape, solution: Solution) -> str:
    """Return a sentence about the RoPE of a solution's heads."""
    slots, pairs, turning = solution.rope_slots, shape.head_dim // 2, shape.turning_pairs
    if not turning:
        return "Queries and keys are not rotated."
    if slots is None or all(sizes.qk == shape.head_dim for sizes in solution.sizes):
        return "RoPE as in the source."
    if solution.shape == "per-layer":
        return "Each layer has its own RoPE slots (`rope_slots` in config.json)."
    if isinstance(slots[0], list):
        return f"RoPE has {len(slots[0])} rotated pairs of {pairs}, others for each type of attention."
    if turning == pairs:
        return f"RoPE has {len(slots)} rotated pairs of {pairs}."
    turned = sum(slot < turning for slot in slots if isinstance(slot, float))
    still = f"{len(slots) - turned} of {pairs - turning}"
    return f"RoPE has {turned} rotated pairs of {turning}, and passes the dims of {still} others through."
