"""Speculative decoding: a proposer drafts tokens, and the target model verifies a whole draft in one forward pass.

- Proposers: `proposer` is their interface, `proposers` lists the choices of `--spec`, each in a file of its own: `ngram`,
  `draft_model`, `self_draft` (qspec, quantspec), `no_drafts`. `drafting` is shared by those that draft with a model.
- Verification: `rejection_sampler`.
- Draft lengths: `adaptive_length`, from the measured times in `cost_model` and the acceptance in `draft_history`.
- `controller` does all of this within a step of the engine, and `metrics` counts.

Imports `runtime.core`, `runtime.sampling`, `runtime.kv_cache` and `runtime.model`.
"""
