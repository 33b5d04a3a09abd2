"""Checkpoints on disk: locate a model, read its tensors, write an artifact, and journal a run so that it can be resumed."""
