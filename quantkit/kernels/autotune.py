"""Picks the fastest of a few configs of a kernel. Each choice is timed once per device and kept in a file.

Triton's own autotuner keeps its choices for one process only, and does not run under the interpreter.
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

#: Names and values of a kernel's tunable parameters.
Config = Mapping[str, int]


class Tuner:
    """Finds and remembers the best configs on one device.

    Attributes:
        path: JSON file, "kernel: problem" -> config. Processes may share it.
        clock: returns the milliseconds that a call takes. If None, the first config is always chosen, and no file is used.
    """

    def __init__(self, path: Path, clock: Callable[[Callable[[], object]], float] | None) -> None:
        self.path, self.clock = path, clock
        self._chosen: dict[object, Config] = {}

    def best(
        self, kernel: str, problem: tuple[object, ...], configs: Sequence[Config], run: Callable[[Config], object]
    ) -> Config:
        """The config to use for a problem, timed if it is not known.

        Args:
            kernel: name of the kernel.
            problem: everything that the choice depends on.
            configs: candidates, the likely best first.
            run: runs the kernel with a config. A config that exceeds the device's resources or memory may raise Triton's or
                torch's out-of-resources error; it is then not chosen.
        """
        known = self._chosen.get((kernel, problem))
        if known is not None:
            return known
        if self.clock is None or len(configs) == 1:
            return configs[0]
        name = f"{kernel}: {' '.join(map(str, problem))}"
        config = self._read().get(name)
        # The file may hold a config of an older version of the kernel.
        if config is None or config not in configs:
            # While a CUDA graph is captured, timing runs would become part of the graph.
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return configs[0]
            times = [self._time(run, each) for each in configs]
            config = configs[times.index(min(times))]
            if min(times) < inf:
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
        """Add a choice to the file, which is replaced atomically. If two processes do so at once, one choice may be lost."""
        # If the cache folder is read-only, the next process has to time again; nothing else breaks.
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump({**self._read(), name: dict(config)}, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)


@cache
def tuner(device: torch.device) -> Tuner:
    """The tuner of a device; its file is $QUANTKIT_CACHE/kernels/<device>-triton-<version>.json."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return Tuner(Path(os.devnull), None)
    clock = partial(triton.testing.do_bench, warmup=5, rep=20, return_mode="median")  # flushes the L2 cache
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return Tuner(cache_dir() / "kernels" / f"{name}-triton-{triton.__version__}.json", clock)
