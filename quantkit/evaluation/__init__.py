"""Measure a model: perplexity, KL divergence, speed, and the tasks of the lm-evaluation-harness.

Never imports the quantization job.
"""
