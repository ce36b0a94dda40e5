"""Quality gates: `ppl_increase > 5%` says when a measured model is not good enough.

A gate is METRIC OPERATOR NUMBER, with `%` after the number for an increase of perplexity relative to the source's.
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from a3cli.errors import CheckFailed

Json = dict[str, Any]
# What a gate may look at, and where an evaluation has it.
METRICS = {
    "perplexity": "perplexity",
    "ppl_increase": "perplexity_increase",
    "kl": "kl",
    "top1_agreement": "top1_agreement",
}
PERCENT = "perplexity_increase_percent"
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
GATE = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Gate:
    """A condition under which a model fails; `key` is the figure that it looks at."""

    text: str
    key: str
    operator: str
    limit: float

    @property
    def needs_source(self) -> bool:
        return self.key != "perplexity"

    def judge(self, figures: Json) -> Json:
        """Whether a model with these figures fails, and by how much. A figure that is not finite fails any gate."""
        value = figures[self.key]
        failed = not math.isfinite(value) or OPERATORS[self.operator](value, self.limit)
        return {"gate": self.text, "value": value, "limit": self.limit, "failed": failed}


def parse_gate(text: Any) -> Gate:
    """Raises ValueError, which says what a gate looks like, for anything else."""
    found = GATE.fullmatch(text) if isinstance(text, str) else None
    if not found or found[1] not in METRICS:
        raise ValueError(f"not of the form METRIC > NUMBER (>, <, >=, <=); metrics are {', '.join(METRICS)}")
    metric, sign, number, percent = found.groups()
    if percent and metric != "ppl_increase":
        raise ValueError("% goes with ppl_increase only")
    if not math.isfinite(float(number)):
        raise ValueError("the number is too large")
    return Gate(text.strip(), PERCENT if percent else METRICS[metric], sign, float(number))


def describe(judged: Json) -> str:
    """One judged gate in words."""
    unit = " %" if judged["gate"].endswith("%") else ""
    difference = abs(judged["value"] - judged["limit"])
    return f"{judged['gate']}: {judged['value']:.4g}{unit}, {difference:.4g}{unit} {side(judged)} the limit"


def side(judged: Json) -> str:
    return "above" if judged["value"] > judged["limit"] else "below"


def raise_for_failures(datasets: list[Json]) -> None:
    """Raise CheckFailed naming every gate that failed, on which data set and by how much."""
    failed = [f"{describe(g)} on {each['dataset']}" for each in datasets for g in each.get("gates", []) if g["failed"]]
    if failed:
        raise CheckFailed(f"{len(failed)} gate{'s' if len(failed) > 1 else ''} failed: " + "; ".join(failed))
