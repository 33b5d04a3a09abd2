"""Processor time and memory of this process, as the operating system counts them."""

import contextlib
import ctypes
import os
import resource
import sys


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_memory() -> int:
    """Largest resident set of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Memory that can be had without swapping, bytes; a container's own limit is not looked at."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out; torch's CPU allocator says so only in words."""
    torch = sys.modules.get("torch")  # where it was never imported, it raised nothing
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "ALLOC_FAILED"))


def return_freed_memory(at_least: int = 1 << 20) -> None:
    """Make the C library give freed blocks of `at_least` that many bytes back at once.

    glibc raises its threshold for that up to 32 MB as it goes, and tensors of a few MB then leave holes that count as
    resident: a third of the peak on a small model. Other C libraries ignore this and the next two.
    """
    _mallopt(_MMAP_THRESHOLD, at_least)


def keep_freed_memory() -> None:
    """Make the C library keep freed blocks for the next ones, until `trim_memory`.

    Where blocks of the same sizes are taken again and again, a page fault for every 4 KB of each costs more than a third of
    the processor time.
    """
    _mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc allows
    _mallopt(_TRIM_THRESHOLD, 1 << 30)


def trim_memory() -> None:
    """Give back what is kept, and the holes between live tensors."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


#: From malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def _mallopt(parameter: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)
