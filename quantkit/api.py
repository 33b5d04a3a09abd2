"""quantkit from Python: `quantize`, `evaluate` and `LLM`.

Each is a thin layer over what the command line runs: `quantization.run`, `evaluation.run` and `runtime.session`. The package
re-exports them, so users write `from quantkit import LLM`. What only one of them needs is imported inside it: `LLM` does
without transformers' modelling code.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantkit.checkpoint.locate import locate
from quantkit.data.prompts import Prompt
from quantkit.errors import RequestError
from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import SamplingParams
from quantkit.runtime.engine.engine import EngineConfig
from quantkit.runtime.kv_cache.eviction import FULL, Budget
from quantkit.runtime.kv_cache.options import CacheOptions, OffloadOptions
from quantkit.runtime.session import Session
from quantkit.utils.device import resolve_device
from quantkit.utils.resources import available_memory

if TYPE_CHECKING:
    from quantkit.evaluation.run import EvalReport
    from quantkit.quantization.progress import Progress
    from quantkit.quantization.report import RunReport
    from quantkit.recipe import Recipe


class LLM:
    """A model that generates text, in quantkit's own engine.

    Example:
        >>> from quantkit import LLM, SamplingParams
        >>> llm = LLM("demo-w4", spec="ngram")
        >>> prompts = ["The capital of France is", "2 + 2 ="]
        >>> for output in llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0)):
        ...     print(output.text, output.finish_reason.value, output.usage.generated)

    Attributes:
        session: the model, its tokenizer and its engine.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        kv_memory: int | None = None,
        kv_dtype: str = "auto",
        kv_policy: str = FULL,
        kv_budget: int | None = None,
        kv_offload: OffloadOptions | None = None,
        max_model_len: int | None = None,
        max_batch: int = 32,
        token_budget: int = 512,
        spec: str = "off",
        draft_len: int | None = None,
        draft_act_bits: int = 8,
    ) -> None:
        """Load a model.

        Args:
            model: a folder (a checkpoint, or an artifact of any format), a Hub id, or "demo".
            device: "auto", "cpu", "cuda" or "cuda:N".
            kv_memory: bytes of the KV cache; None: half of the memory that is free.
            kv_dtype: how keys and values are stored: "auto", "bf16", "fp8", "int8", "int4" or "int4+4".
            kv_policy: which past tokens a sequence keeps: "full", "window", "sinks" or "scored".
            kv_budget: how many tokens that is; not for "full".
            kv_offload: host memory and disk for cached prefixes that leave the KV cache; None: they are dropped.
            max_model_len: tokens in the longest sequence; None: the model's context length.
            max_batch: sequences that run at a time, at most.
            token_budget: new tokens per step, at most; longer prompts are computed in chunks.
            spec: the draft proposer: "off", "ngram", "draft:MODEL", "qspec" or "quantspec".
            draft_len: tokens per draft; None: adapts to what pays.
            draft_act_bits: bits of the activations of "qspec" drafts, 4 or 8.

        Raises:
            QuantkitError: the model cannot be found or loaded, an option does not fit it, or memory does not suffice.
        """
        # Options are checked before a model is fetched.
        budget = Budget(kv_policy, kv_budget)
        cache = CacheOptions(kv_memory, max_model_len, max_batch, token_budget, dtype=kv_dtype, budget=budget)
        config = EngineConfig(max_batch=max_batch, token_budget=token_budget, draft_len=draft_len)
        chosen = resolve_device(device)
        self.session = Session(locate(str(model)), chosen, cache, config, kv_offload, spec, draft_act_bits)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool = False,
        watch: Callable[[Output], None] | None = None,
    ) -> list[Output]:
        """Complete prompts, as many at a time as `max_batch` allows.

        Args:
            prompts: a text, a conversation (a list of messages with "role" and "content"), or a list of either.
            params: how to sample: for all prompts, or one for each. None: `SamplingParams()`.
            chat: put each text into the model's chat template as a message of the user's. Conversations always go through it.
            watch: called with each piece of output as soon as it is generated.

        Returns:
            One output per prompt, in the order of the prompts; `SamplingParams.n` of them per prompt where that is above 1.
            Each has `text`, `token_ids`, `finish_reason`, `usage` and, where asked for, `logprobs`.

        Raises:
            RequestError: a prompt cannot be served (too long, or no chat template), or there is not one `params` per prompt.
                Nothing is generated then.
        """
        several = _as_list(prompts)
        each = [params or SamplingParams()] * len(several) if isinstance(params, SamplingParams | None) else list(params)
        if len(each) != len(several):
            raise RequestError(f"{len(each)} sampling parameters for {len(several)} prompts; give one, or one for each prompt")
        requests = [self.session.request(p, own, chat=chat) for p, own in zip(several, each, strict=True)]
        return self.session.engine.generate(requests, watch)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list: a text or a conversation is one prompt."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: "str | Path | Recipe" = "gptq-w4",
    *,
    device: str = "auto",
    max_memory: int | None = None,
    overwrite: bool = False,
    progress: "Progress | None" = None,
    **overrides: Any,
) -> "RunReport":
    """Quantize a model and write an artifact that quantkit and, depending on its format, other engines load.

    If it is interrupted, the same call continues after the last finished block.

    Example:
        >>> from quantkit import quantize
        >>> report = quantize("demo", "demo-w4", recipe="gptq-w4", group_size=64, calibration={"samples": 32})
        >>> print(report.totals.bits_per_weight, report.worst)

    Args:
        model: a folder, a Hub id, or "demo".
        out: the folder of the artifact. It appears complete or not at all.
        recipe: a built-in recipe's name, a YAML file, an artifact's quantkit.json, or a `Recipe`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        max_memory: bytes of host memory for calibration activations; None: half of what is available. The rest goes to a file.
        overwrite: replace `out`, or an unfinished run with different settings.
        progress: told about each matrix and block; None: nothing is reported.
        **overrides: fields of `Recipe` that replace the recipe's own; `calibration` may name some of its fields only.

    Returns:
        What `quantkit.json` in the artifact says.

    Raises:
        QuantkitError: the model, the recipe, the text or the output folder does not allow it; the message says why.
    """
    from quantkit.quantization.progress import NoProgress
    from quantkit.quantization.run import QuantizeRequest, quantize_model
    from quantkit.recipe import Recipe, load_recipe, recorded_computing

    recipe = str(recipe) if isinstance(recipe, Path) else recipe
    request = QuantizeRequest(
        folder=locate(str(model)),
        out=Path(out),
        recipe=load_recipe(recipe, overrides),
        device=resolve_device(device),
        max_memory=available_memory() // 2 if max_memory is None else max_memory,
        overwrite=overwrite,
        compute_settings={} if isinstance(recipe, Recipe) else recorded_computing(recipe),
    )
    return quantize_model(request, progress or NoProgress())


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    text: str = "builtin",
    windows: int = 10,
    seq_len: int = 1024,
    kv_dtype: str | None = None,
    kv_policy: str = FULL,
    kv_budget: int | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> "EvalReport":
    """Measure a model's perplexity and, with a baseline, how far its predictions are from the baseline's.

    Example:
        >>> from quantkit import evaluate
        >>> report = evaluate("demo-w4", baseline="demo", windows=4, seq_len=512)
        >>> print(report.model.metrics.perplexity, report.ppl_increase, report.model.metrics.kl_mean)

    Args:
        model: a folder, a Hub id, or "demo".
        baseline: the model to compare with, usually the original.
        text: a text set's name, a file, or "hf:DATASET".
        windows: windows of text, which do not overlap.
        seq_len: tokens per window; the first one of each is not scored.
        kv_dtype: run through the engine's KV cache of this type; None: without a KV cache.
        kv_policy: which past tokens a sequence keeps; see `LLM`.
        kv_budget: how many tokens that is; not for "full".
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: called with (stage, blocks done, blocks).

    Raises:
        QuantkitError: a model or the text cannot be read, or the two models do not share a vocabulary.
    """
    from quantkit.evaluation.run import EvalRequest, run_evaluation

    request = EvalRequest(
        model=locate(str(model)),
        baseline=None if baseline is None else locate(str(baseline)),
        text=text,
        windows=windows,
        seq_len=seq_len,
        device=resolve_device(device),
        kv_dtype=kv_dtype,
        budget=Budget(kv_policy, kv_budget),
    )
    return run_evaluation(request, progress or (lambda stage, done, total: None))
