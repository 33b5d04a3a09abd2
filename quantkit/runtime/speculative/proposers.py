"""The choices of `--spec`. This module is light: names and descriptions are read without importing torch.

To add a draft proposer, write a `Proposer` and an opener in a file of its own and add its line here. Command-line choices,
help and error messages follow. The name of a proposer is its spelling on the command line: "draft:MODEL" takes an argument.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import RequestError
from quantkit.utils.registry import Registry

if TYPE_CHECKING:
    import torch

    from quantkit.runtime.kv_cache.options import CacheOptions
    from quantkit.runtime.speculative.opened_model import OpenedModel

#: Most tokens per draft. With the token before them, they are as many as a CUDA graph takes (`cuda_graphs.MAX_QUERY_LEN`).
MAX_DRAFT_LEN = 15


@dataclass(frozen=True)
class SpecRequest:
    """What to open: a model, and a proposer that drafts for it.

    Attributes:
        spec: as the user wrote it, for error messages.
        folder: of the model.
        device: where it runs.
        cache: how much it holds, a draft model's cache included.
        argument: what follows the colon of `spec`; "" for proposers that take no argument.
        act_bits: bits of the activations of drafts, 4 or 8, where the proposer quantizes them.
    """

    spec: str
    folder: Path
    device: "torch.device"
    cache: "CacheOptions"
    argument: str = ""
    act_bits: int = 8


#: Spelling on the command line -> what loads the model and its proposer. An opener raises a `RequestError` where the model or
#: the cache lacks what the proposer needs.
PROPOSERS: "Registry[Callable[[SpecRequest], OpenedModel]]" = Registry(
    "draft proposer",
    {
        "off": ("quantkit.runtime.speculative.no_drafts:open_without_drafts", "no drafts"),
        "ngram": (
            "quantkit.runtime.speculative.ngram:open_ngram",
            "prompt lookup, what followed the last time that the same tokens occurred",
        ),
        "draft:MODEL": (
            "quantkit.runtime.speculative.draft_model:open_draft_model",
            "a smaller model with the same tokenizer",
        ),
        "qspec": (
            "quantkit.runtime.speculative.self_draft:open_qspec",
            "the model itself with quantized activations",
        ),
        "quantspec": (
            "quantkit.runtime.speculative.self_draft:open_quantspec",
            "the model itself with half of an int4+4 cache",
        ),
    },
)


def find_proposer(spec: str) -> tuple[str, str]:
    """The name of a proposer in `PROPOSERS`, and its argument.

    Args:
        spec: such as "ngram" or "draft:demo".

    Raises:
        RequestError: no proposer is spelled like that.
    """
    kind, colon, argument = spec.partition(":")
    for name in PROPOSERS:
        expected, _, metavar = name.partition(":")
        if kind == expected and bool(colon) == bool(argument) == bool(metavar):
            return name, argument
    raise RequestError(f"--spec {spec}: no such proposer; use {PROPOSERS.alternatives()}")


def open_with_proposer(
    spec: str, folder: Path, device: "torch.device", cache: "CacheOptions", act_bits: int = 8
) -> "OpenedModel":
    """Load a model and the proposer that drafts for it.

    Args:
        spec: a name in `PROPOSERS`, with an argument if it takes one.
        folder, device, cache, act_bits: see `SpecRequest`.

    Raises:
        RequestError: no proposer is spelled like that, or the model or the cache lacks what the proposer needs.
        QuantkitError: a model cannot be loaded, or the cache is too small.
    """
    name, argument = find_proposer(spec)
    return PROPOSERS[name](SpecRequest(spec, folder, device, cache, argument, act_bits))
