"""Options of every verb that runs the engine: stated once, spread over the command line by `with_engine`."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from quantkit.api import LLM
from quantkit.cli import options
from quantkit.errors import RequestError
from quantkit.runtime.kv_cache.eviction import FULL
from quantkit.runtime.kv_cache.offload import OffloadOptions
from quantkit.runtime.session import Session


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run: each field is an option of the same name."""

    device: options.Device = "auto"
    kv_memory: Annotated[
        str | None, typer.Option(help="Memory of the KV cache, e.g. 2GiB; default: half of what is free.")
    ] = None
    kv_policy: options.KvPolicy = FULL
    kv_budget: options.KvBudget = None
    kv_offload: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Host memory for known prefixes that leave the cache, in GiB or e.g. 500MiB."),
    ] = None
    kv_offload_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where they go when that is full, too.")] = None
    kv_dtype: options.KvDtype = "auto"
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence; default: the model's context.")] = None
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences that run at a time.")] = 32
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens a step; longer prompts come in pieces.")] = 512
    spec: Annotated[
        str | None,
        typer.Option(
            metavar="off|ngram|draft:MODEL|qspec|quantspec",
            help="Who drafts tokens that the model then checks at once; default: off.",
        ),
    ] = None
    draft_len: Annotated[str, typer.Option(metavar="N|auto", help="Tokens of a draft; auto: what pays.")] = "auto"
    draft_act_bits: Annotated[int | None, typer.Option(help="Bits of qspec's activations, 4 or 8; default: 8.")] = None

    def open(self, model: str) -> Session:
        """Load MODEL and its engine.

        Raises:
            QuantkitError: an option does not make sense, or the model cannot be run so.
        """
        memory = None if self.kv_memory is None else options.byte_size(self.kv_memory, "--kv-memory")
        draft_len = options.draft_length(self.draft_len)
        if self.spec is None and draft_len is not None:
            raise RequestError("--draft-len is about drafts and nothing drafts; add --spec, or leave it out")
        if self.spec != "qspec" and self.draft_act_bits is not None:
            raise RequestError("--draft-act-bits is about --spec qspec; add that, or leave it out")
        llm = LLM(
            model,
            device=self.device,
            kv_memory=memory,
            kv_dtype=self.kv_dtype,
            kv_policy=self.kv_policy,
            kv_budget=self.kv_budget,
            kv_offload=self._offload(),
            max_model_len=self.max_model_len,
            max_batch=self.max_batch,
            token_budget=self.token_budget,
            spec=self.spec or "off",
            draft_len=draft_len,
            draft_act_bits=8 if self.draft_act_bits is None else self.draft_act_bits,
        )
        return llm.session

    def _offload(self) -> OffloadOptions | None:
        if self.kv_offload is not None:
            return OffloadOptions(options.byte_size(self.kv_offload, "--kv-offload", bare="GiB"), self.kv_offload_dir)
        if self.kv_offload_dir is not None:
            raise RequestError("--kv-offload-dir takes what host memory does not hold; add --kv-offload SIZE")
        return None


def with_engine(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb`, whose parameter `engine` becomes one option for each field of `EngineOptions`."""
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
