"""Every command of the command line, and an order in which all of them work."""

from pathlib import Path

import yaml

STAGES = ("calibrate", "solve", "pareto", "export", "eval")
COMMANDS = (*STAGES, "verify", "plan", "run", "stats merge", "inspect", "report", "generate")


RECIPE = """
work: {folder}/recipe-work
out: {folder}/recipe-out
calibrate: {{model: {source}, text: {{dataset: {text}, samples: 2, seq_len: 32}}}}
solve: {{budget: 0.2, method: paper, head_multiple: 2, mlp_multiple: 8}}
"""


def write_recipe(path: Path, source: Path, text: Path, **sections: object) -> Path:
    """Write a recipe for a tiny model that is evaluated on two blocks; `sections` replace its own."""
    blocks = {"dataset": str(text), "samples": 3, "seq_len": 32}
    content = {
        "work": "work",
        "out": "out",
        "calibrate": {"model": str(source), "text": blocks},
        "solve": {"budget": 0.25, "head_multiple": 2, "mlp_multiple": 8},
        "verify": False,
        "eval": {"against": str(source), "text": {**blocks, "samples": 2}},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content | sections))
    return path


def commands_of(group, prefix=""):
    """Return all commands by their full names, including those of groups."""
    found = {}
    for name, command in group.commands.items():
        inner = commands_of(command, f"{prefix}{name} ") if hasattr(command, "commands") else {prefix + name: command}
        found |= inner
    return found


def chain(source, text_file, folder) -> dict[str, tuple]:
    """Return one call of each command, in an order in which they work."""
    text, work = ("--dataset", text_file, "--samples", 2, "--seq-len", 32), ("--work", folder / "work")
    sizes, out = ("--head-multiple", 2, "--mlp-multiple", 8), folder / "out"
    return {
        "calibrate": (source, *text, *work),
        "solve": ("--budget", 0.2, "--method", "paper", *sizes, *work),
        "pareto": ("--budgets", "0.2", *sizes, *work),
        "export": (out, *work),
        "eval": (out, "--against", source, *text, "--fail-if", "kl < 0"),
        "verify": (out, *work),
        "inspect": (out,),
        "generate": (out, "--against", source, "--prompt", "Once upon a time", "--max-new-tokens", 8),
        "report": (out, "--html", folder / "report.html"),
        "plan": (source, "--seq-len", 32, "--head-multiple", 2, "--mlp-multiple", 8),
        "stats merge": (folder / "work", folder / "more", "--into", folder / "merged"),
        "run": (folder / "recipe.yaml",),
    }
