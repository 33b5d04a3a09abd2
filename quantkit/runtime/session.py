"""A model that is ready to generate: weights, KV cache, tokenizer and engine, opened in one call; and the summary of a run."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.checkpoint.reader import Checkpoint, read_json
from quantkit.checkpoint.tokenizer import load_tokenizer
from quantkit.data.prompts import Prompt
from quantkit.errors import CheckpointError, RequestError, install_command
from quantkit.runtime.core.constraint import Constraint
from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.offload import KVOffload
from quantkit.runtime.kv_cache.options import CacheOptions, OffloadOptions
from quantkit.runtime.speculative.metrics import SpeculationStats
from quantkit.runtime.speculative.proposers import open_with_proposer
from quantkit.utils.resources import peak_memory, trim_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantkit.runtime.sampling.json_schema import JsonGrammars


@dataclass(frozen=True)
class Summary:
    """The numbers of a run.

    Attributes:
        load_seconds: time to load the model from its folder until it can run, without Python imports.
        seconds: from the first request to the last token.
        prompt_tokens, cached_tokens, output_tokens: sums over all requests; cached tokens were found in the prefix cache.
        ttft_seconds: first token - arrival, mean over samples.
        output_tps: output tokens / seconds.
        decode_tps: (n - 1) / (end - first token), mean over samples; None if no sample has two tokens.
        peak_memory_bytes: largest resident set size.
        kv_memory_bytes: size of the allocated KV caches, including that of a draft model.
        kv_tokens, kv_dtype: capacity in tokens and data type of the model's own KV cache.
        evicted_blocks: KV blocks that sequences dropped to stay within `--kv-budget`.
        offloaded_blocks, fetched_blocks: KV blocks saved by `--kv-offload`, and fetched back instead of computed again.
        speculation: numbers of the drafts; None without speculation.
    """

    load_seconds: float
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_seconds: float
    output_tps: float
    decode_tps: float | None
    peak_memory_bytes: int
    kv_memory_bytes: int
    kv_tokens: int
    kv_dtype: str
    evicted_blocks: int
    offloaded_blocks: int
    fetched_blocks: int
    speculation: SpeculationStats | None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)


class Session:
    """A model and its engine.

    Attributes:
        model: the model with its KV cache.
        draft_cache: the KV cache of the draft model; None if there is none.
        tokenizer: the model's tokenizer.
        engine: runs the model; owns its KV cache.
        eos_token_ids: tokens that end a text.
        load_seconds: how long loading took.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        cache: CacheOptions,
        config: EngineConfig,
        offload: OffloadOptions | None = None,
        speculation: str = "off",
        draft_act_bits: int = 8,
    ) -> None:
        """
        Args:
            folder: folder of the checkpoint or artifact.
            device: where the model runs.
            cache: size and data type of the KV cache, and the budget per sequence.
            config: limits of the engine. Its `eviction` is replaced by the one that `cache` asks for.
            offload: where known prefixes go when they must leave the cache; None: they are dropped.
            speculation, draft_act_bits: the draft proposer, see `open_with_proposer`.

        Raises:
            QuantkitError: a model cannot be loaded, the draft model does not match the model, the KV cache is too small, or
                there is no room for offloaded blocks.
        """
        checkpoint = Checkpoint(folder)
        # Before the model: what reading the tokenizer takes is free again when the weights come.
        self.tokenizer = load_tokenizer(checkpoint)
        trim_memory()
        started = time.monotonic()
        self.model, new_proposer, self.draft_cache = open_with_proposer(speculation, folder, device, cache, draft_act_bits)
        self.load_seconds = time.monotonic() - started
        self.eos_token_ids = _eos_token_ids(checkpoint, self.tokenizer)
        draft_bytes = 0 if self.draft_cache is None else self.draft_cache.nbytes
        kv_offload = None if offload is None else KVOffload(self.model.cache, offload, draft_bytes)
        config = replace(config, eviction=cache.budget.eviction(self.model.block_size))
        proposer = None if new_proposer is None else new_proposer()
        eos = self.eos_token_ids
        self.engine = Engine(self.model, config, decode=self._decode, eos_token_ids=eos, offload=kv_offload, proposer=proposer)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def grammars(self) -> "JsonGrammars":
        """Compiles constraints for this model; created on first use, which may happen in any thread.

        Raises:
            RequestError: llguidance is not installed or does not support this kind of tokenizer.
        """
        try:
            from quantkit.runtime.sampling.json_schema import JsonGrammars  # an extra, and only needed here
        except ImportError:
            raise RequestError(f"JSON output needs llguidance; run: {install_command('serve')}") from None
        return JsonGrammars(self.tokenizer, self.model.vocab_size, self.eos_token_ids)

    def request(self, prompt: Prompt, params: SamplingParams, *, chat: bool, constraint: Constraint | None = None) -> Request:
        """Build a request from a prompt.

        Args:
            prompt: text, or chat messages.
            params: how to sample.
            chat: apply the chat template to a text prompt, as a user's message; it is always applied to chat messages.
            constraint: what every sample must look like, from `grammars`; None: no constraint.

        Raises:
            RequestError: the model has no chat template, the template refuses the messages, or the text is not valid Unicode.
        """
        if isinstance(prompt, str) and not chat:
            return Request(self._tokens(prompt, special=True), params, constraint)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not self.tokenizer.chat_template:
            raise RequestError("the model has no chat template; give it text: without --chat, or to /v1/completions")
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # jinja and transformers raise many types
            raise RequestError(f"the chat template refuses the messages ({' '.join(str(error).split())[:200]})") from error
        return Request(self._tokens(text, special=False), params, constraint)

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # Such a string can come from JSON: "\\ud800" is accepted by Python's parser.
            wrong = f"half of a surrogate pair, U+{ord(text[error.start]):X}"
            raise RequestError(f"the prompt holds {wrong}, which is not a character; send whole characters") from None
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def summary(self, outputs: Sequence[Output], seconds: float) -> Summary:
        """Summarize a finished run.

        Args:
            outputs: one merged output per sample, as `Engine.generate` returns them.
            seconds: wall-clock time of the run.
        """
        prompts = [output.usage for output in outputs if output.index == 0]
        generated = sum(output.usage.generated for output in outputs)
        times = [(output.timing, output.usage.generated) for output in outputs]
        first = [time.first_token - time.arrival for time, _ in times if time.first_token is not None]
        rates = [
            (count - 1) / (time.finished - time.first_token)
            for time, count in times
            if time.first_token is not None and time.finished is not None and count > 1
        ]
        stats = self.engine.stats
        return Summary(
            load_seconds=self.load_seconds,
            seconds=seconds,
            prompt_tokens=sum(usage.prompt for usage in prompts),
            cached_tokens=sum(usage.cached for usage in prompts),
            output_tokens=generated,
            ttft_seconds=sum(first) / max(len(first), 1),
            output_tps=generated / seconds,
            decode_tps=sum(rates) / len(rates) if rates else None,
            peak_memory_bytes=peak_memory(),
            kv_memory_bytes=self.model.cache.nbytes + (self.draft_cache.nbytes if self.draft_cache else 0),
            kv_tokens=self.model.cache.num_tokens,
            kv_dtype=self.model.cache.format.name,
            evicted_blocks=stats.evicted_blocks,
            offloaded_blocks=stats.offload.saved if stats.offload else 0,
            fetched_blocks=stats.offload.fetched if stats.offload else 0,
            speculation=stats.speculation,
        )


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Collect the tokens that end a text from all of the model's files that name them.

    Raises:
        CheckpointError: generation_config.json cannot be read.
    """
    path = checkpoint.folder / "generation_config.json"
    stated = [read_json(path).get("eos_token_id")] if path.is_file() else []
    stated += [checkpoint.config.get("eos_token_id"), tokenizer.eos_token_id]
    flat = [token for entry in stated for token in (entry if isinstance(entry, list) else [entry]) if token is not None]
    if not all(isinstance(token, int) for token in flat):
        raise CheckpointError(f"{path}: eos_token_id is neither a token id nor a list of them; correct it")
    return set(flat)
