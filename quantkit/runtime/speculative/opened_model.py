"""A model that was opened together with a draft proposer."""

from collections.abc import Callable
from typing import NamedTuple

from quantkit.runtime.kv_cache.cache import KVCache
from quantkit.runtime.model.model_runner import ModelRunner
from quantkit.runtime.speculative.proposer import Proposer


class OpenedModel(NamedTuple):
    """A model and what drafts for it.

    Attributes:
        model: with its cache.
        new_proposer: makes a proposer for each engine that runs the model; None: nothing drafts.
        draft_cache: the cache of a draft model.
    """

    model: ModelRunner
    new_proposer: Callable[[], Proposer] | None
    draft_cache: KVCache | None = None
