"""Which blocks a sequence evicts when it has filled its budget of KV memory.

Whole blocks are evicted, and the remaining tokens keep their positions: keys are stored rotated, so nothing that is kept
changes. A sequence that holds `blocks` full blocks evicts `stride` of them before its next token is computed, and no step runs
across that point. So what a token sees depends on its position alone, never on chunks, batch or preemption. A sequence that is
recomputed evicts the same blocks again (under `scored` only up to rounding, because there the choice depends on attention
mass).

Sources: attention sinks and recent tokens are from StreamingLLM (arXiv 2309.17453). The attention mass of the newest query
    over all heads is the measure of TOVA (arXiv 2401.06104). Here it is taken per block and over all layers, because one block
    table serves all layers, and the mass of earlier queries decays.
"""

import sys
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import zip_longest

from quantkit.errors import RecipeError, RequestError

#: Earlier scores are multiplied by this each time that blocks are evicted.
AGEING = 0.5

#: Tokens that a sequence may hold if nothing is evicted.
UNBOUNDED = sys.maxsize

#: (scores of the blocks that may be evicted, oldest first; how many must be) -> indices of those that are.
Choice = Callable[[SequenceOf[float], int], Iterable[int]]


def oldest(scores: SequenceOf[float], count: int) -> Iterable[int]:
    """The indices of the oldest blocks."""
    return range(count)


def lowest(scores: SequenceOf[float], count: int) -> Iterable[int]:
    """The indices of the blocks with the lowest scores; of equal ones, the older."""
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count])


@dataclass(frozen=True)
class Policy:
    """A choice of `--kv-policy`: how to select the blocks to evict.

    Attributes:
        choose: selects among the blocks after the sinks and before the recent ones.
        sinks: blocks at the start of the text that are never evicted.
        description: one line for help texts.
        scored: `choose` looks at scores, which are attention mass.
    """

    choose: Choice
    sinks: int
    description: str
    scored: bool = False

    @property
    def holes(self) -> bool:
        """Whether kept blocks may lie on both sides of dropped ones."""
        return self.sinks > 0


#: Name -> policy. `FULL`, which evicts nothing, is not among them.
POLICIES = {
    "window": Policy(oldest, sinks=0, description="the newest tokens"),
    "sinks": Policy(oldest, sinks=1, description="the start of the text and the newest tokens"),
    "scored": Policy(lowest, sinks=1, scored=True, description="the same, and the tokens that attention looks at most"),
}
FULL = "full"


@dataclass(frozen=True)
class Eviction:
    """A policy and its sizes in blocks.

    Attributes:
        policy: how to choose.
        blocks: most blocks that a sequence holds.
        stride: blocks evicted at a time.
    """

    policy: Policy
    blocks: int
    stride: int

    @property
    def recent(self) -> int:
        """The number of newest blocks that are never evicted: half, as heavy hitters and recent tokens share it in H2O
        (2306.14048).
        """
        return self.blocks // 2

    def aged(self, scores: SequenceOf[float], mass: SequenceOf[float]) -> list[float]:
        """Scores of `blocks` blocks: the decayed earlier scores, which the first blocks have, plus the new attention mass."""
        return [AGEING * score + new for score, new in zip_longest(scores, mass or [0.0] * self.blocks, fillvalue=0.0)]

    def drop(self, scores: SequenceOf[float]) -> list[int]:
        """Ascending indices of the blocks to evict, of `blocks` full ones with these scores."""
        assert len(scores) == self.blocks
        first = self.policy.sinks
        return [first + place for place in self.policy.choose(scores[first : self.blocks - self.recent], self.stride)]


@dataclass(frozen=True)
class Budget:
    """The options `--kv-policy` and `--kv-budget`.

    Attributes:
        policy: FULL or a key of POLICIES.
        tokens: most tokens that a sequence holds, rounded down to whole blocks; None with FULL.

    Raises:
        RecipeError: an unknown policy, one without a budget, or a budget without one.
    """

    policy: str = FULL
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.policy != FULL and self.policy not in POLICIES:
            raise RecipeError(f"--kv-policy {self.policy}: there is no such policy; use {FULL}, {', '.join(POLICIES)}")
        if self.policy != FULL and self.tokens is None:
            raise RecipeError(f"--kv-policy {self.policy} needs to know how many tokens to keep; add --kv-budget TOKENS")
        if self.policy == FULL and self.tokens is not None:
            raise RecipeError(f"--kv-budget needs a policy that drops tokens; add --kv-policy {', '.join(POLICIES)}")

    def capacity(self, block_size: int) -> int:
        """Tokens that a sequence may hold, in blocks of `block_size`."""
        return UNBOUNDED if self.tokens is None else self.tokens // block_size * block_size

    def eviction(self, block_size: int) -> Eviction | None:
        """The policy in blocks of `block_size` tokens; None if nothing is evicted.

        An eighth of the budget is evicted at a time. Chunks of a prompt are as long, and a query sees at least seven eighths.

        Raises:
            RecipeError: the budget is less than three blocks.
        """
        if self.tokens is None:
            return None
        blocks = self.tokens // block_size
        if blocks < 3:  # one sink, one recent block, and one that may be evicted
            found = f"--kv-budget {self.tokens} is less than 3 blocks of {block_size} tokens"
            raise RecipeError(f"{found}; give {3 * block_size} or more")
        return Eviction(POLICIES[self.policy], blocks, max(1, blocks // 8))


def check_windows(chosen: Eviction, block_size: int, window: int) -> None:
    """Refuse layers with sliding windows that would see tokens before a hole that their window should hide.

    Kernels count a window in keys that are held. As long as it ends among the recent blocks, which have no holes between
    them, that is the same as counting positions.

    Args:
        chosen: how blocks are evicted.
        block_size: tokens per block.
        window: the widest window of the model's layers; 0 if every layer sees everything.

    Raises:
        RequestError: the window is wider than the recent blocks of a policy that leaves holes.
    """
    recent = chosen.recent * block_size
    if chosen.policy.holes and window > recent:
        raise RequestError(
            f"--kv-policy: the model has layers with a window of {window:,} tokens, and only the newest {recent:,} are kept "
            f"without gaps; use --kv-policy window or a --kv-budget of {2 * -(-window // block_size) * block_size:,} or more"
        )
