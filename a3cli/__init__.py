"""a3: smaller language models in closed form (A³, arXiv 2505.12942)."""

__version__ = "0.1.0"
