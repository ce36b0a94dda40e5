"""The methods that shrink each component: the paper's and a3's. Chosen by `--method`."""

from typing import Any

from a3cli.methods.base import Analysis, Curves, Method, Prediction, Projection, Slots, Table
from a3cli.methods.best import Best
from a3cli.methods.gradients import LayerGradients
from a3cli.methods.inputs import LayerInputs
from a3cli.methods.paper import Paper

METHODS: dict[str, type[Method[Any]]] = {"best": Best, "paper": Paper}

__all__ = [
    "METHODS",
    "Analysis",
    "Curves",
    "LayerGradients",
    "LayerInputs",
    "Method",
    "Prediction",
    "Projection",
    "Slots",
    "Table",
]
