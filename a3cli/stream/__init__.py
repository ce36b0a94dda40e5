"""The layer stream: token blocks → activations, one layer at a time."""
