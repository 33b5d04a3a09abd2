"""`quantkit eval --speed`: prefill and decode speed, latency, throughput and memory of a model.

    ppN     tokens/s of one forward over N prompt tokens, nothing cached
    tgN     tokens/s of N greedy steps of one token each, starting from an empty context
            (both: mean and standard deviation of 5 runs after a warm-up, without tokenization and sampling, like llama-bench)
    TTFT    first token - arrival, one request of 128 prompt tokens, through the whole engine
    TPOT    (end - first token) / (n - 1), the same request with 64 new tokens; median of 3 requests for both
    weights bytes of weights that one decode step reads; GB/s = that times tg128, to be compared with the read bandwidth of
            this machine (256 MiB summed by all threads, best of 5)
    system  output tokens of all requests / wall time, 128 prompt and 64 new tokens each, all arriving at once;
            the better of two runs

Peak memory is the largest resident set of the process, and on a GPU also its peak memory there. So each model is measured in
its own process.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantkitError
from quantkit.runtime.core import latency
from quantkit.runtime.core.batch import single_sequence_batch
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.model.model_runner import ModelRunner, open_model
from quantkit.runtime.sampling.top_k import argmax
from quantkit.utils.resources import peak_memory, return_freed_memory

REPEATS = 5
PROMPT, NEW = 128, 64
CONCURRENT = (1, 4, 16)


@dataclass(frozen=True)
class Rate:
    """Tokens per second: mean and standard deviation."""

    mean: float
    sd: float


@dataclass(frozen=True)
class SpeedReport:
    """One model's speed; the module's docstring defines the terms.

    Attributes:
        name: the model's folder.
        device: where it ran; threads: number of CPU threads.
        load_seconds: from the folder to a model that is ready to run, imports excluded.
        rates: pp128, pp512, tg128.
        ttft_seconds, tpot_seconds: of one request alone.
        weight_bytes: bytes of weights that one decode step reads; read_bandwidth: of the machine, bytes/s; weight_bandwidth:
            achieved, bytes/s.
        system_tps: number of concurrent requests -> output tokens/s.
        peak_memory_bytes, peak_device_bytes: of the host process and of the GPU.
    """

    name: str
    device: str
    threads: int
    load_seconds: float
    rates: dict[str, Rate]
    ttft_seconds: float
    tpot_seconds: float
    weight_bytes: int
    read_bandwidth: float
    weight_bandwidth: float
    system_tps: dict[str, float]
    peak_memory_bytes: int
    peak_device_bytes: int

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SpeedReport":
        """The inverse of `dataclasses.asdict`."""
        return cls(**data | {"rates": {name: Rate(**rate) for name, rate in data["rates"].items()}})


def measure_in_subprocess(folder: Path, device: torch.device) -> SpeedReport:
    """Run `measure` in its own process, so that the peak memory is that of this model alone.

    Raises:
        QuantkitError: the model cannot be measured; the message is that of the child process.
    """
    command = [sys.executable, "-m", "quantkit.evaluation.speed", str(folder), str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == QuantkitError.exit_code:
        raise QuantkitError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"measuring {folder} failed:\n{done.stderr}")
    return SpeedReport.from_json(json.loads(done.stdout))


def measure(folder: Path, device: torch.device) -> SpeedReport:
    """Load and measure one model.

    Raises:
        QuantkitError: it cannot be loaded.
    """
    started = time.perf_counter()
    options = CacheOptions(max_batch=max(CONCURRENT))
    model = open_model(folder, device, options)
    load_seconds = time.perf_counter() - started
    rates = {f"pp{n}": _rate(model, n, _prefill) for n in (128, 512)} | {"tg128": _rate(model, 128, _decode)}
    engine, vocab = Engine(model, EngineConfig(max_batch=max(CONCURRENT), prefix_caching=False)), model.vocab_size
    single = [_request_times(engine, vocab) for _ in range(3)]
    system = {str(count): _system_tps(engine, vocab, count) for count in CONCURRENT}
    weights, peak = model.loaded.weight_bytes(), peak_memory()  # before measuring the bandwidth allocates memory
    return SpeedReport(
        name=str(folder),
        device=str(device),
        threads=torch.get_num_threads(),
        load_seconds=load_seconds,
        rates=rates,
        ttft_seconds=statistics.median(first for first, _ in single),
        tpot_seconds=statistics.median(each for _, each in single),
        weight_bytes=weights,
        read_bandwidth=read_bandwidth(device),
        weight_bandwidth=weights * rates["tg128"].mean,
        system_tps=system,
        peak_memory_bytes=peak,
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def read_bandwidth(device: torch.device) -> float:
    """Memory read bandwidth of this machine, bytes/s."""
    values = torch.ones(1 << 26, device=device)
    return values.nbytes / min(_seconds(lambda: values.sum().item()) for _ in range(REPEATS))


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def prompt_tokens(count: int, vocab: int, number: int = 0) -> list[int]:
    """Arbitrary token ids. Prompts with different numbers differ from their first token on."""
    return [(7919 * position + 31 * number) % vocab for position in range(1, count + 1)]


def _rate(model: ModelRunner, tokens: int, run: Callable[[ModelRunner, Tensor], None]) -> Rate:
    prompt = torch.tensor(prompt_tokens(tokens, model.vocab_size))
    speeds = [tokens / _seconds(lambda: run(model, prompt)) for _ in range(1 + REPEATS)][1:]
    return Rate(statistics.mean(speeds), statistics.stdev(speeds))


def _prefill(model: ModelRunner, prompt: Tensor) -> None:
    model.forward(single_sequence_batch(prompt, 0, model.block_size))


def _decode(model: ModelRunner, prompt: Tensor) -> None:
    token = prompt[:1]
    for position in range(len(prompt)):
        token = torch.tensor(argmax(model.forward(single_sequence_batch(token, position, model.block_size))))


def _requests(count: int, vocab: int) -> list[Request]:
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    return [Request(prompt_tokens(PROMPT, vocab, number), params) for number in range(count)]


def _request_times(engine: Engine, vocab: int) -> tuple[float, float]:
    """TTFT and TPOT of a single request, seconds."""
    (output,) = engine.generate(_requests(1, vocab))
    per_token = latency.tpot(output)
    assert per_token is not None
    return latency.ttft(output), per_token


def _system_tps(engine: Engine, vocab: int, count: int) -> float:
    requests = _requests(count, vocab)
    return count * NEW / min(_seconds(lambda: engine.generate(requests)) for _ in range(2))


if __name__ == "__main__":
    return_freed_memory()
    try:
        print(json.dumps(asdict(measure(Path(sys.argv[1]), torch.device(sys.argv[2])))))
    except QuantkitError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
