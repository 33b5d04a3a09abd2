"""The engine's state in numbers."""

from dataclasses import dataclass

from quantkit.runtime.kv_cache.offload import OffloadStats
from quantkit.runtime.speculative.metrics import SpeculationStats


@dataclass(frozen=True)
class EngineStats:
    """Gauges, and counters since the engine was created.

    Attributes:
        running, waiting: sequences.
        used_blocks, num_blocks: KV blocks that sequences hold, and all KV blocks.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and those found (counters).
        preemptions, steps: counters.
        evicted_blocks: blocks that sequences dropped to stay within their KV budget (counter).
        offload: counters of KV offload; None if it is off.
        speculation: counters of the drafts; None without a proposer.
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
