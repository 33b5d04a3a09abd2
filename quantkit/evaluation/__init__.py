"""Measure a model: perplexity, KL divergence, speed, and the tasks of the lm-evaluation-harness.

Imports checkpoint, data, formats, models and runtime; never quantization.
"""
