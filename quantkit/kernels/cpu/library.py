"""Native CPU kernels: C sources that are compiled on first use with the system's compiler and loaded through ctypes.

Shipped binaries would have to exist for every kind of processor. Compiling on the spot builds for the processor at hand, and
needs no headers but the compiler's own. If there is no compiler, or it fails, `load` returns None and callers fall back to
torch.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from quantkit.kernels.cpu.variants import NATIVE, Variant, processor
from quantkit.utils.cache_dir import cache_dir

_LOG = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent / "csrc"
_SOURCES = (
    "attention.c",
    "attention_plan.c",
    "decoder.c",
    "dense.c",
    "gram.c",
    "hadamard.c",
    "kv_read.c",
    "kv_write.c",
    "matmul.c",
    "pack.c",
    "packed.c",
    "packed_bytes.c",
    "packed_input.c",
    "packed_pairs.c",
    "row_max.c",
    "threads.c",
    "w4a8.c",
)
_HEADERS = (
    "attention.h",
    "decoder.h",
    "dense.h",
    "dot.h",
    "hadamard.h",
    "kv_cache.h",
    "matmul.h",
    "matrix.h",
    "packed.h",
    "packed_tile.h",
    "threads.h",
    "vec.h",
    "w4a8.h",
)

#: Without -ffast-math, so that sums keep their order and NaN and infinity their meaning. Multiplications and additions are
#: contracted to fused multiply-adds.
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)

#: avoid-fma-max-bits=0: for AMD processors GCC splits some long chains of fused multiply-adds and not others. That is slower,
#: and two instances of the same formula would give different results. The other two flags keep sums of integers in the order
#: in which they are written: GCC would compute all products first, and there are more of them than registers.
_GCC_FLAGS = ("--param=avoid-fma-max-bits=0", "-fno-tree-reassoc", "-fno-tree-ter")


@cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels. None if they cannot be built or loaded, which is logged once as a warning.

    The first call on a machine takes several seconds, for the compiler; the library is kept in the user's cache.
    """
    try:
        return load_variant(NATIVE)
    except (OSError, subprocess.SubprocessError) as error:
        _LOG.warning("no native CPU kernels (%s): using torch's slower ones; install a C compiler such as gcc", error)
        return None


def load_variant(variant: Variant) -> ctypes.CDLL:
    """The kernels, compiled for one kind of processor; kept in the user's cache, too.

    Raises:
        OSError: there is no compiler, it does not know the variant's flags, or the library cannot be loaded.
        subprocess.SubprocessError: the compiler does not tell its version, or does not end.
    """
    loaded = ctypes.CDLL(str(_built(variant)))
    for function in (loaded.quantkit_prepared_floats, loaded.quantkit_gram_words):
        function.restype = ctypes.c_int64
    return loaded


def threads() -> int:
    """How many threads a call should use: as many as torch does, whose OpenMP runtime the kernels share (see threads.h)."""
    return torch.get_num_threads()


def _built(variant: Variant) -> Path:
    """Path of the shared library, which is compiled unless the cache has it already."""
    command = _compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    flags = (*_FLAGS, *variant.flags) if "clang" in version else (*_FLAGS, *_GCC_FLAGS, *variant.flags)
    recipe = hashlib.sha256(repr((command, version, flags, processor())).encode())
    for name in _SOURCES + _HEADERS:
        recipe.update((_FOLDER / name).read_bytes())
    path = cache_dir() / "native" / f"{recipe.hexdigest()[:24]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: two processes may build at the same time, and neither loads an incomplete file.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            out = Path(scratch) / "kernels.so"
            sources = [str(_FOLDER / name) for name in _SOURCES]
            _run([*command, *flags, *sources, "-o", str(out), "-lm"])
            out.replace(path)
    return path


def _run(command: list[str]) -> None:
    """Run the compiler.

    Raises:
        OSError: it failed; the message is the first line of its output.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise OSError(next(iter(done.stderr.splitlines()), f"{command[0]} ended with {done.returncode}"))


def _compiler() -> list[str]:
    """The command in $CC, or else the first compiler found.

    Raises:
        OSError: no compiler was found.
    """
    if own := os.environ.get("CC"):
        return shlex.split(own)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise OSError("no C compiler found")
