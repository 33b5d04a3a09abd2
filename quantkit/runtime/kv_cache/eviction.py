"""Which blocks a sequence gives up when it has filled its budget of KV memory.

Whole blocks go, and positions stay what they were: keys are stored rotated, so nothing that is kept changes. A sequence that
holds `blocks` full blocks drops `stride` of them before its next token is computed, and no step runs across that point. So
what a token sees depends on its position alone, never on chunks, batch or preemption; a sequence that is computed anew
drops the same blocks again (under `scored` to rounding: there the blocks depend on attention mass).

Sources: attention sinks and recent tokens are StreamingLLM's (arXiv 2309.17453); mass over heads of the newest query as the
measure is TOVA's (arXiv 2401.06104), here per block and over all layers, because one block table serves all of them, and
with what earlier queries looked at fading.
"""

import sys
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import zip_longest

from quantkit.errors import RecipeError, RequestError

#: What an earlier score counts, each time that blocks are dropped.
AGEING = 0.5

#: Tokens that a sequence may hold where nothing is dropped.
UNBOUNDED = sys.maxsize

#: From the scores of the blocks that may go, oldest first, and how many must, to the places of those that do.
Choice = Callable[[SequenceOf[float], int], Iterable[int]]


def oldest(scores: SequenceOf[float], count: int) -> Iterable[int]:
    """The first ones."""
    return range(count)


def lowest(scores: SequenceOf[float], count: int) -> Iterable[int]:
    """Those with the least score; of equal ones the older."""
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count])


@dataclass(frozen=True)
class Policy:
    """A way to choose: among the blocks behind the first `sinks` and before the recent ones, by what `choose` says.

    `scored` tells whether it looks at attention mass, `holes` whether what is left may have gaps.
    """

    choose: Choice
    sinks: int
    scored: bool = False

    @property
    def holes(self) -> bool:
        """Whether kept blocks may lie on both sides of dropped ones."""
        return self.sinks > 0


#: Name -> policy; `FULL` drops nothing and is none of them.
POLICIES = {
    "window": Policy(oldest, sinks=0),
    "sinks": Policy(oldest, sinks=1),
    "scored": Policy(lowest, sinks=1, scored=True),
}
FULL = "full"


@dataclass(frozen=True)
class Eviction:
    """A policy with its numbers, in blocks.

    Attributes:
        policy: how to choose.
        blocks: that a sequence holds at most.
        stride: how many go at a time.
    """

    policy: Policy
    blocks: int
    stride: int

    @property
    def recent(self) -> int:
        """Newest blocks that never go: half, as heavy hitters and recent tokens share a budget in H2O (arXiv 2306.14048)."""
        return self.blocks // 2

    def aged(self, scores: SequenceOf[float], mass: SequenceOf[float]) -> list[float]:
        """Scores of `blocks` blocks after another look: earlier ones, of the first blocks, and the new attention mass."""
        return [AGEING * score + new for score, new in zip_longest(scores, mass or [0.0] * self.blocks, fillvalue=0.0)]

    def drop(self, scores: SequenceOf[float]) -> list[int]:
        """Ascending places of the blocks that go, of `blocks` full ones with these scores."""
        assert len(scores) == self.blocks
        first = self.policy.sinks
        return [first + place for place in self.policy.choose(scores[first : self.blocks - self.recent], self.stride)]


@dataclass(frozen=True)
class Budget:
    """What the options `--kv-policy` and `--kv-budget` ask for.

    Attributes:
        policy: FULL or a key of POLICIES.
        tokens: that a sequence holds at most, rounded down to whole blocks; None with FULL.

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
        """The policy in blocks of `block_size` tokens; None where nothing is dropped.

        An eighth of the budget goes at a time: a chunk of a prompt is as long, and a query sees seven eighths of it at least.

        Raises:
            RecipeError: it is fewer than three blocks.
        """
        if self.tokens is None:
            return None
        blocks = self.tokens // block_size
        if blocks < 3:  # a sink, a recent block, and one that may go
            found = f"--kv-budget {self.tokens} is less than 3 blocks of {block_size} tokens"
            raise RecipeError(f"{found}; give {3 * block_size} or more")
        return Eviction(POLICIES[self.policy], blocks, max(1, blocks // 8))


def check_windows(chosen: Eviction, block_size: int, window: int) -> None:
    """Refuse layers with sliding windows that would see behind a hole what their window should hide.

    Kernels count a window in keys that are held. As long as it ends among the recent blocks, which have no holes between
    them, that is the same as counting positions.

    Args:
        chosen: what is dropped.
        block_size: tokens in a block.
        window: the widest of the model's layers; 0 where every layer sees everything.

    Raises:
        RequestError: the window is wider than the recent blocks of a policy that leaves holes.
    """
    recent = chosen.recent * block_size
    if chosen.policy.holes and window > recent:
        raise RequestError(
            f"--kv-policy: the model has layers with a window of {window:,} tokens, and only the newest {recent:,} are "
            f"without holes; use --kv-policy window or a --kv-budget of {2 * -(-window // block_size) * block_size:,} or more"
        )
