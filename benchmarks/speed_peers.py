"""The other engines of `benchmarks.speed`, each in its own process: transformers, and llama.cpp if it is installed.

The terms are those of quantkit.evaluation.speed: ppN and tg128 as in llama-bench (mean and standard deviation of 5 after a
warm-up), TTFT of 128 prompt tokens and TPOT over 64 new ones, output tokens/s of 16 requests (128 prompt, 64 new tokens)
decoded as one batch, load time without imports, largest resident set.

usage: python -m benchmarks.speed_peers transformers FOLDER DTYPE | llama.cpp FILE.gguf
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from quantkit.evaluation.speed import NEW, PROMPT, REPEATS, prompt_tokens
from quantkit.utils.resources import peak_memory

BATCH = 16


class Peer(Protocol):
    """Interface of an engine: start over, and append the same number of tokens to each sequence, greedily."""

    vocab: int

    def clear(self) -> None:
        """Forget all sequences."""

    def step(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Append a row of tokens to each sequence; returns the likeliest next token of each."""
        ...


class Transformers:
    """The model from `from_pretrained`, with its dynamic cache."""

    def __init__(self, folder: str, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.vocab: int = self._model.config.vocab_size
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def step(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """See `Peer`."""
        out = self._model(torch.tensor(rows), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        chosen: list[int] = out.logits[:, -1].argmax(-1).tolist()
        return chosen


class LlamaCpp:
    """llama.cpp through its C interface, with its defaults except for threads and context length."""

    def __init__(self, path: str) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # must stay alive: C code calls it
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = BATCH * (PROMPT + NEW), 2048, 512, BATCH
        options.kv_unified = True
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.vocab: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0

    def step(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """See `Peer`."""
        import numpy as np

        lasts, index = [], 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                self._batch.token[index], self._batch.pos[index] = token, self._length + offset
                self._batch.n_seq_id[index], self._batch.seq_id[index][0] = 1, sequence
                self._batch.logits[index] = offset == len(row) - 1
                index += 1
            lasts.append(index - 1)
        self._batch.n_tokens = index
        status = self._lib.llama_decode(self._context, self._batch)
        if status:
            raise SystemExit(f"llama_decode failed: {status}")
        self._length += len(rows[0])
        logits = (self._lib.llama_get_logits_ith(self._context, last) for last in lasts)
        return [int(np.ctypeslib.as_array(row, (self.vocab,)).argmax()) for row in logits]


def seconds(run: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def rate(tokens: int, run: Callable[[], object]) -> dict[str, float]:
    """Tokens per second over the repeats."""
    speeds = [tokens / seconds(run) for _ in range(1 + REPEATS)][1:]
    return {"mean": statistics.mean(speeds), "sd": statistics.stdev(speeds)}


def measure(peer: Peer) -> dict[str, object]:
    """All numbers except the load time."""

    def prefill(count: int) -> list[int]:
        peer.clear()
        return peer.step([prompt_tokens(count, peer.vocab)])

    def decode(count: int) -> None:
        peer.clear()
        tokens = prompt_tokens(1, peer.vocab)
        for _ in range(count):
            tokens = peer.step([tokens])

    def concurrent() -> None:
        peer.clear()
        prompts = [prompt_tokens(PROMPT, peer.vocab, sequence) for sequence in range(BATCH)]
        tokens = peer.step(prompts)
        for _ in range(NEW - 1):
            tokens = peer.step([[token] for token in tokens])

    rates = {f"pp{n}": rate(n, partial(prefill, n)) for n in (128, 512)} | {"tg128": rate(128, lambda: decode(128))}
    ttft = statistics.median(seconds(lambda: prefill(PROMPT)) for _ in range(3))

    def rest() -> None:
        tokens = prefill(PROMPT)
        for _ in range(NEW - 1):
            tokens = peer.step([tokens])

    tpot = (statistics.median(seconds(rest) for _ in range(3)) - ttft) / (NEW - 1)
    system = {str(BATCH): BATCH * NEW / min(seconds(concurrent) for _ in range(2))}
    return {"rates": rates, "ttft_seconds": ttft, "tpot_seconds": tpot, "system_tps": system}


def main() -> None:
    """Print one JSON object."""
    kinds: dict[str, Callable[..., Peer]] = {"transformers": Transformers, "llama.cpp": LlamaCpp}
    started = time.perf_counter()
    peer = kinds[sys.argv[1]](*sys.argv[2:])
    load = time.perf_counter() - started
    print(json.dumps(measure(peer) | {"load_seconds": load, "peak_memory_bytes": peak_memory()}))


if __name__ == "__main__":
    main()
