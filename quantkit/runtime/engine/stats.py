"""Where an engine stands, in numbers."""

from dataclasses import dataclass

from quantkit.runtime.kv_cache.offload import OffloadStats
from quantkit.runtime.speculative.metrics import SpeculationStats


@dataclass(frozen=True)
class EngineStats:
    """Where an engine stands.

    Attributes:
        running, waiting: sequences.
        used_blocks, num_blocks: KV blocks that sequences hold, and all there are.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found, since the start.
        preemptions, steps: since the start.
        evicted_blocks: that sequences dropped to stay within their budget, since the start.
        offload: of blocks outside of the model's cache; None without a store.
        speculation: what became of drafts since the start; None without a proposer.
    """

    running: int
    waiting: int
    used_blocks: int
    num_blocks: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    steps: int
    evicted_blocks: int
    offload: OffloadStats | None
    speculation: SpeculationStats | None
