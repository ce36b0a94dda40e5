"""Write docs/families.md from the definitions in `a3cli/models/families` and the rules in `a3cli/runtimes`.

python scripts/families.py
"""

from collections.abc import Iterator
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a3cli.models.families import FAMILIES, Family
from a3cli.models.shipped import module_name
from a3cli.runtimes import Verdict, judge
from a3cli.settings import COMPONENTS, Component
from a3cli.work.files import Json

TARGET = Path(__file__).resolve().parents[1] / "docs" / "families.md"
SHAPES = ("stock", "per-layer")
HEAD = """# What a3 does for each model type

Written by `python scripts/families.py`, from the definitions in `a3cli/models/families` and the rules in
`a3cli/runtimes`. [add-a-family.md](add-a-family.md) says how to add a type.

## What is compressed

- **exact**: in closed form, by a theorem of the paper (OV, and QK without RoPE) or by least squares for the channels
  that are kept (MLP). The default method then refines QK for the output of attention; `--method paper` does not.
- **refined**: RoPE turns queries and keys, which leaves no closed form; maps start from one and are refined on sampled
  attention, and judged on blocks that were held out. `--method paper` selects pairs instead.
- **if asked**: if `--components` names it, and in the stock shape for `--kv-budget` and `--attention-budget`. Smaller
  heads then have norms of their own, fitted with the maps ([method.md](method.md)).
- **no**: the component keeps its size, for the reason in the last column.

"""
RUNTIMES = """
## What loads an export

"yes" and "no" mean what they mean in [formats.md](formats.md#what-loads-an-export), "as the source" is yes where the
runtime loads the source, "–" was not tried; numbers are notes below the table. `a3 plan`, `a3 export` and the model
card say the same for the model at hand. RoPE of smaller heads is a changed theta where that costs next to nothing, else
longrope factors ([how](formats.md#rope-of-the-kept-pairs)). Sizes here are multiples of 16.

"""
# An export of each form, as far as the rules read config.json; heads of 128 become 96.
SIZES: Json = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0}
SMALLER: Json = {**SIZES, "head_dim": 96}
WORDS = {"yes": "yes", "no": "no", "untried": "–"}


def page() -> str:
    """Return the content of docs/families.md."""
    return HEAD + "\n".join(compressed()) + "\n" + RUNTIMES + "\n".join(loading()) + "\n"


def compressed() -> Iterator[str]:
    """Yield the rows of the table of components: two for each model type."""
    yield "| model type | shape | class | QK | OV | MLP | why not |"
    yield "|---|---|---|---|---|---|---|"
    for name, family in sorted(FAMILIES.items()):
        for shape in SHAPES:
            cells = [how(family, component, shape) for component in COMPONENTS]
            reason = (family.why_whole(shape) or "") if {*cells} - {"exact", "refined"} else ""
            title = f"`{name}`" if shape == SHAPES[0] else ""
            yield f"| {title} | {shape} | {class_of(family, shape)} | {' | '.join(cells)} | {reason} |"


def how(family: Family, component: Component, shape: str) -> str:
    """Return how a component is made smaller: exact or refined, by default or if asked, or no."""
    if component not in family.possible(shape, "best"):
        return "no"
    found = "refined" if component == "qk" and family.rotates else "exact"
    return found if component in family.compressible(shape) else f"{found}, if asked"


def class_of(family: Family, shape: str) -> str:
    """Return transformers' class, or the one that a3 ships in the export's folder with its file."""
    if shape == "stock":
        return f"`{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]}`"
    return f"`{family.per_layer_class}` in `{module_name(family.model_type)}.py`"


def loading() -> Iterator[str]:
    """Yield the rows of the table of runtimes, then the notes to which its numbers refer."""
    notes: dict[str, int] = {}
    rows = [(name, form, verdicts) for name, family in sorted(FAMILIES.items()) for form, verdicts in forms(family)]
    yield f"| model type | export | {' | '.join(each.runtime for each in rows[0][2])} |"
    yield "|---" * (len(rows[0][2]) + 2) + "|"
    before = ""
    for name, form, verdicts in rows:
        cells = [cell(verdict, notes) for verdict in verdicts]
        yield f"| {f'`{name}`' if name != before else ''} | {form} | {' | '.join(cells)} |"
        before = name
    yield ""
    yield from (f"{number}. {note[0].upper()}{note[1:]}." for note, number in notes.items())


def forms(family: Family) -> Iterator[tuple[str, list[Verdict]]]:
    """Yield each form that an export of a family can have, and what loads it."""
    kind, could_be_llama = {"model_type": family.model_type}, family.like_llama
    if family.compressible("stock"):
        yield "stock, whole heads", judge(SIZES | kind, smaller_heads=False, could_be_llama=could_be_llama)
    if "qk" in family.possible("stock", "best"):
        for form, rope in (("theta", "default"), ("longrope", "longrope")):
            parameters: Json = {"rope_type": rope, "rope_theta": 10000.0}
            if family.local_rope:
                parameters = {"full_attention": parameters, "sliding_attention": parameters}
            config = SMALLER | kind | {"rope_parameters": parameters}
            yield f"stock, {form}", judge(config, smaller_heads=True, could_be_llama=could_be_llama)
    if could_be_llama and family.model_type != "llama":
        yield "stock, `--as llama`", judge(SMALLER | {"model_type": "llama"}, smaller_heads=True, retyped=True)
    if family.compressible("per-layer"):
        yield "per-layer", judge(SIZES | kind | {"per_layer_config": {}}, smaller_heads=False)


def cell(verdict: Verdict, notes: dict[str, int]) -> str:
    """Return a verdict in a word, with the number of its note, which is added to the notes if it is new."""
    word = WORDS[verdict.loads]
    if "as it loads the source" in verdict.note:
        return "as the source"
    if not verdict.note or verdict.loads == "untried":
        return word
    number = notes.setdefault(verdict.note, len(notes) + 1)
    return f"{word} ({number})"


def main() -> None:
    TARGET.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
