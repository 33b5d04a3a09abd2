"""Runs a model for many requests at a time: paged KV cache, continuous batching, sampling, speculative decoding.

Rooms, lowest first: core, sampling and kv_cache, model, speculative, engine. `session` opens all of them for one model folder.
Nothing here imports the quantization pipeline, the server or the command line.
"""
