"""Checkpoints on disk: locate a model, read its tensors, write an artifact, and journal a run so that it can be resumed.

Knows files and tensors, but no model, method or format: it imports errors and utils only.
"""
