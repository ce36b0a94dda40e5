"""The method's mathematics: tensors in, tensors and error curves out. No models, paths, logging or CLI here."""
