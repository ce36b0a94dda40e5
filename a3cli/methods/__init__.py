"""How each component is made smaller: the paper's way, and ours. Chosen by `--method`."""

from a3cli.methods.base import Curves, LayerInputs, Method
from a3cli.methods.best import Best
from a3cli.methods.paper import Paper

METHODS: dict[str, type[Method]] = {"best": Best, "paper": Paper}

__all__ = ["METHODS", "Curves", "LayerInputs", "Method"]
