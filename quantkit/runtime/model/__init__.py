"""A model that runs. This room knows nothing of requests: it takes batches.

- Weights: `weights` reads them, `loader` makes modules of them, which multiply (`layers`).
- `definition` puts these modules into transformers' model definition. Only the eager backend needs it; nothing else imports
  transformers' modelling code.
- `attention`: paged attention as an attention implementation of transformers.
- `backends`: the ways to compute a forward pass: eager, `cuda_graphs`, and native (`native_builder`, `native_decoder`).
- `model_runner`: a loaded model with its cache, which picks a backend for each batch.

Imports `runtime.core`, `runtime.kv_cache`, `kernels`, `formats`, `checkpoint` and `models`.
"""
