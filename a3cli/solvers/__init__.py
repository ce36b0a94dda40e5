"""The method's mathematics: tensors in, tensors and error curves out. No model, path, logger or CLI here."""
