"""Models as transformers defines them: families and configs as data, and a model without weights, which streams its blocks.

This room knows nothing about quantization methods or the engine.
"""
