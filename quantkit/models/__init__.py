"""Models as transformers defines them: families as data, a skeleton without weights, and a decoder that streams its blocks
from disk. Knows nothing of quantization methods or of the engine.
"""
