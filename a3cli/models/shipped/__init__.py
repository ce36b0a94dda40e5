"""Code that travels with a per-layer export and runs there: it knows torch and transformers, nothing of a3."""
