"""A checkpoint as a model: where it is, its tensors, shape, RoPE and family."""
