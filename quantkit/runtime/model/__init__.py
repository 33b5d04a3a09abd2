"""A model that runs: loaded weights, linear layers, paged attention, and the backends of a forward pass (eager, CUDA graphs,
native decoder). Knows nothing of requests: it takes batches.
"""
