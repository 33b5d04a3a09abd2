"""Run a model for many requests at a time: paged KV cache, continuous batching, sampling."""
