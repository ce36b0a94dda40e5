"""Quality gates: a model fails the gate `ppl_increase > 5%` if its figures meet that condition.

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
# The metrics of gates, and their names in an evaluation.
METRICS = {
    "perplexity": "perplexity",
    "ppl_increase": "perplexity_increase",
    "kl": "kl",
    "top1_agreement": "top1_agreement",
    "continuation_accuracy": "continuation_accuracy",
    "continuation_drop": "continuation_drop",
    "last_word_accuracy": "last_word_accuracy",
    "last_word_drop": "last_word_drop",
}
WITHOUT_SOURCE = ("perplexity", "continuation_accuracy", "last_word_accuracy")
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
    """A condition under which a model fails; `key` is the name of its figure in an evaluation."""

    text: str
    key: str
    operator: str
    limit: float

    @property
    def needs_source(self) -> bool:
        return self.key not in WITHOUT_SOURCE

    @property
    def needs_continuations(self) -> bool:
        return self.key.startswith(("continuation", "last_word"))

    def judge(self, figures: Json) -> Json:
        """Return whether a model with these figures fails, with value and limit. A non-finite figure always fails."""
        value = figures[self.key]
        failed = not math.isfinite(value) or OPERATORS[self.operator](value, self.limit)
        return {"gate": self.text, "value": value, "limit": self.limit, "failed": failed}


def parse_gate(text: Any) -> Gate:
    """Return the gate that a text describes. Raises ValueError with the form of a gate for any other text."""
    found = GATE.fullmatch(text) if isinstance(text, str) else None
    if not found or found[1] not in METRICS:
        raise ValueError(f"must have the form METRIC > NUMBER (>, <, >=, <=); metrics are {', '.join(METRICS)}")
    metric, sign, number, percent = found.groups()
    if percent and metric != "ppl_increase":
        raise ValueError("% goes with ppl_increase only")
    if not math.isfinite(float(number)):
        raise ValueError("the number is too large")
    return Gate(text.strip(), PERCENT if percent else METRICS[metric], sign, float(number))


def describe(judged: Json) -> str:
    """Describe the outcome of a gate."""
    unit = " %" if judged["gate"].endswith("%") else ""
    difference = abs(judged["value"] - judged["limit"])
    return f"{judged['gate']}: {judged['value']:.4g}{unit}, {difference:.4g}{unit} {side(judged)} the limit"


def side(judged: Json) -> str:
    return "above" if judged["value"] > judged["limit"] else "below"


def raise_for_failures(datasets: list[Json]) -> None:
    """Raise CheckFailed if a gate failed, naming each such gate, its data set and the distance from the limit."""
    failed = [f"{describe(g)} on {each['dataset']}" for each in datasets for g in each.get("gates", []) if g["failed"]]
    if failed:
        raise CheckFailed(f"{len(failed)} gate{'s' if len(failed) > 1 else ''} failed: " + "; ".join(failed))
