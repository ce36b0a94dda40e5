"""The methods that shrink each component: the paper's and a3's. Chosen by `--method`."""

from a3cli.methods.base import Curves, LayerInputs, Method
from a3cli.methods.best import Best
from a3cli.methods.paper import Paper

METHODS: dict[str, type[Method]] = {"best": Best, "paper": Paper}

__all__ = ["METHODS", "Curves", "LayerInputs", "Method"]
