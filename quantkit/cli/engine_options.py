"""Options of every verb that runs the engine: written once, and added to a verb's own options by `with_engine`."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from quantkit.cli import complete, options
from quantkit.errors import RequestError
from quantkit.runtime.kv_cache.dtypes import require_kv_dtype
from quantkit.runtime.kv_cache.eviction import FULL, Budget
from quantkit.runtime.speculative.proposers import PROPOSERS, find_proposer

if TYPE_CHECKING:
    from quantkit.runtime.session import Session

#: For `Verb.when_out_of_memory`: options of every verb that runs the engine.
LESS_MEMORY = "lower --kv-memory or --max-batch, or use another --device"


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run: each field is an option of the same name."""

    device: options.Device = "auto"
    kv_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the KV cache, e.g. 2GiB. Default: half of the free memory.")
    ] = None
    kv_policy: options.KvPolicy = FULL
    kv_budget: options.KvBudget = None
    kv_offload: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Host memory for cached prompt prefixes that no longer fit into the KV cache, e.g. 8 (GiB) or 500MiB.",
        ),
    ] = None
    kv_offload_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for prefixes that do not fit into --kv-offload either.")
    ] = None
    kv_dtype: options.KvDtype = "auto"
    max_model_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Longest sequence, in tokens. Default: the model's context length.")
    ] = None
    max_batch: Annotated[
        int,
        typer.Option(
            "--max-batch", "--max-num-seqs", min=1, metavar="N", help="Sequences that run at the same time, at most."
        ),
    ] = 32
    token_budget: Annotated[
        int,
        typer.Option(
            "--token-budget",
            "--max-num-batched-tokens",
            min=1,
            metavar="N",
            help="Tokens per step, at most. Longer prompts are processed in chunks.",
        ),
    ] = 512
    spec: Annotated[
        str | None,
        typer.Option(
            metavar="PROPOSER",
            autocompletion=complete.names(PROPOSERS),
            help="Speculative decoding: what drafts the next tokens, which the model then checks in one step. Default: off. "
            + "; ".join(f"{name}: {PROPOSERS.description(name)}" for name in PROPOSERS if name != "off")
            + ".",
        ),
    ] = None
    draft_len: Annotated[
        str, typer.Option(metavar="N|auto", help="Tokens per draft. auto adapts the length to how many are accepted.")
    ] = "auto"
    draft_act_bits: Annotated[
        int | None, typer.Option(metavar="4|8", help="For --spec qspec: bits of the draft's activations. Default: 8.")
    ] = None

    def __post_init__(self) -> None:
        """Check what can be checked before torch is imported.

        Raises:
            QuantkitError: an option's value is not understood, or options contradict each other.
        """
        Budget(self.kv_policy, self.kv_budget)
        require_kv_dtype(self.kv_dtype)
        find_proposer(self.spec or "off")
        for size, option in ((self.kv_memory, "--kv-memory"), (self.kv_offload, "--kv-offload")):
            if size is not None:
                options.byte_size(size, option)
        if self.kv_offload is None and self.kv_offload_dir is not None:
            raise RequestError("--kv-offload-dir holds what does not fit into host memory; add --kv-offload SIZE")
        if self.spec is None and self.draft_len != "auto":
            raise RequestError(
                "--draft-len sets the length of drafts, but without --spec there are none; add --spec, or drop --draft-len"
            )
        if self.spec != "qspec" and self.draft_act_bits is not None:
            raise RequestError("--draft-act-bits applies to --spec qspec only; add that, or drop --draft-act-bits")

    def open(self, model: str) -> "Session":
        """Load MODEL and its engine.

        Raises:
            QuantkitError: the model cannot be loaded, or not be run with these options.
        """
        from quantkit.api import LLM
        from quantkit.runtime.kv_cache.options import OffloadOptions

        offload = None
        if self.kv_offload is not None:
            offload = OffloadOptions(options.byte_size(self.kv_offload, "--kv-offload", bare="GiB"), self.kv_offload_dir)
        llm = LLM(
            model,
            device=self.device,
            kv_memory=None if self.kv_memory is None else options.byte_size(self.kv_memory, "--kv-memory"),
            kv_dtype=self.kv_dtype,
            kv_policy=self.kv_policy,
            kv_budget=self.kv_budget,
            kv_offload=offload,
            max_model_len=self.max_model_len,
            max_batch=self.max_batch,
            token_budget=self.token_budget,
            spec=self.spec or "off",
            draft_len=options.draft_length(self.draft_len),
            draft_act_bits=8 if self.draft_act_bits is None else self.draft_act_bits,
        )
        return llm.session


def with_engine(verb: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the parameter `engine` of `verb` becomes one option for each field of `EngineOptions`."""
    hints = get_type_hints(EngineOptions, include_extras=True)
    own = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(EngineOptions)
    ]

    @functools.wraps(verb)
    def run(**given: object) -> None:
        chosen = {each.name: given.pop(each.name) for each in own}
        verb(**given, engine=EngineOptions(**chosen))  # type: ignore[arg-type]

    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb, eval_str=True).parameters.items():
        parameters += own if name == "engine" else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
