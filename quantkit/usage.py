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


def return_freed_memory() -> None:
    """Make the C library give large freed blocks back at once.

    glibc raises its threshold for that up to 32 MB as it goes, and tensors of a few MB then leave holes that count as
    resident: a third of the peak on a small model. Other C libraries ignore this.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)


def trim_memory() -> None:
    """Give the holes between live small tensors back; without it they grow from block to block. glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
