"""Models as transformers defines them: families as data, a model without weights, and one that streams its blocks from disk.

This room knows nothing about quantization methods or the engine.
"""
