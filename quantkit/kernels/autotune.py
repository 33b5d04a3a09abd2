"""The best of a few configs of a kernel, timed once per device and remembered in a file.

Triton's own autotuner keeps its choices for one process, times again in the next, and refuses to run under the interpreter.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from math import inf
from pathlib import Path

import torch
import triton
import triton.testing
from triton.runtime.errors import PTXASError

from quantkit.utils.cache_dir import cache_dir

#: Names and values of a kernel's choices.
Config = Mapping[str, int]


class Tuner:
    """Chosen configs of one device.

    Attributes:
        path: JSON file, "kernel: problem" -> config. Processes may share it.
        clock: milliseconds that a call takes; None chooses the first config everywhere and touches no file.
    """

    def __init__(self, path: Path, clock: Callable[[Callable[[], object]], float] | None) -> None:
        self.path, self.clock = path, clock
        self._chosen: dict[object, Config] = {}

    def best(
        self, kernel: str, problem: tuple[object, ...], configs: Sequence[Config], run: Callable[[Config], object]
    ) -> Config:
        """The config to use.

        Args:
            kernel: its name.
            problem: all that the choice depends on.
            configs: candidates, the likely best first.
            run: runs the kernel; may raise what says that the device cannot hold a config, or its memory the timing.
        """
        known = self._chosen.get((kernel, problem))
        if known is not None:
            return known
        if self.clock is None or len(configs) == 1:
            return configs[0]
        name = f"{kernel}: {' '.join(map(str, problem))}"
        config = self._read().get(name)
        # What an older kernel chose may mean nothing to this one.
        if config is None or config not in configs:
            # Timing would become part of a CUDA graph that is being captured.
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return configs[0]
            took = [self._time(run, each) for each in configs]
            config = configs[took.index(min(took))]
            if min(took) < inf:
                self._write(name, config)
        return self._chosen.setdefault((kernel, problem), config)

    def _time(self, run: Callable[[Config], object], config: Config) -> float:
        assert self.clock is not None
        try:
            return self.clock(lambda: run(config))
        except (triton.OutOfResources, PTXASError, torch.OutOfMemoryError):
            return inf

    def _read(self) -> dict[str, Config]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, config: Config) -> None:
        """Add to the file, replacing it in one move. Of two processes that do so at once, one may have to tune again."""
        # A read-only cache costs time in the next process and nothing else.
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump({**self._read(), name: dict(config)}, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)


@cache
def tuner(device: torch.device) -> Tuner:
    """The tuner of a device, whose file is $QUANTKIT_CACHE/kernels/<device>-triton-<version>.json."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return Tuner(Path(os.devnull), None)
    clock = partial(triton.testing.do_bench, warmup=5, rep=20, return_mode="median")  # milliseconds, the L2 cache flushed
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return Tuner(cache_dir() / "kernels" / f"{name}-triton-{triton.__version__}.json", clock)
