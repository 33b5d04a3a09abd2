"""Native CPU kernels: C sources compiled on first use with the system's compiler and loaded through ctypes.

A binary of our own would have to be built for every processor; a compiler on the spot builds for the one at hand and needs
no headers but its own. Where there is no compiler, or it fails, `load` returns None and callers fall back to torch.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from quantkit.utils.cache_dir import cache_dir

_LOG = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent / "csrc"
_SOURCES = (
    *("matmul.c", "packed.c", "packed_input.c", "rounded.c", "dense.c", "pack.c"),
    *("paging.c", "cache.c", "cache_write.c", "attention.c", "hadamard.c", "decoder.c", "row_maximum.c", "team.c"),
)
_HEADERS = ("vec.h", "team.h", "matmul.h", "attention.h", "hadamard.h", "decoder.h")

#: No -ffast-math: sums keep their order, NaN and infinity their meaning. Contraction to fused multiply-add stays on.
_FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)

#: On AMD processors GCC splits long chains of fused multiply-adds, some and not others: slower, and results would differ
#: between two instances of the same formula. The others keep a sum of integers in the order in which it is written: GCC would
#: gather its products first, more of them than there are registers.
_GCC_FLAGS = ("--param=avoid-fma-max-bits=0", "-fno-tree-reassoc", "-fno-tree-ter")


@cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be built or loaded, which is logged as a warning, once.

    Takes some seconds the first time on a machine; the result is kept in the user's cache.
    """
    try:
        loaded = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.warning("no native CPU kernels (%s): torch's serve, more slowly; install a C compiler such as gcc", error)
        return None
    loaded.quantkit_prepared_floats.restype = ctypes.c_int64
    return loaded


def threads() -> int:
    """Threads that a call should use: torch's own, whose OpenMP runtime the kernels share (see team.h)."""
    return torch.get_num_threads()


def _built() -> Path:
    """Path of the shared library, compiled if it is not in the cache."""
    command = _compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    flags = _FLAGS if "clang" in version else _FLAGS + _GCC_FLAGS
    recipe = hashlib.sha256(repr((command, version, flags, _processor())).encode())
    for name in _SOURCES + _HEADERS:
        recipe.update((_FOLDER / name).read_bytes())
    path = cache_dir() / "native" / f"{recipe.hexdigest()[:24]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that two processes may build at once and neither loads half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            out = Path(scratch) / "kernels.so"
            sources = [str(_FOLDER / name) for name in _SOURCES]
            _run([*command, *flags, *sources, "-o", str(out), "-lm"])
            out.replace(path)
    return path


def _run(command: list[str]) -> None:
    """Run the compiler.

    Raises:
        OSError: it failed; holds the first line of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise OSError(next(iter(done.stderr.splitlines()), f"{command[0]} ended with {done.returncode}"))


def _compiler() -> list[str]:
    """$CC, or the first compiler found.

    Raises:
        OSError: there is none.
    """
    if own := os.environ.get("CC"):
        return shlex.split(own)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise OSError("no C compiler found")


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})) + platform.machine() + platform.processor()
