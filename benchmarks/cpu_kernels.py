"""Time the CPU's matrix products over rows 1 to 1,024 and every layout, and fail where another way would be faster.

For each layout, shape and number of rows, these are timed in turn:

    native    what the runtime uses: the kernels as they are compiled for this processor
    VARIANT   the same kernels, compiled for fewer of its instructions (quantkit.kernels.cpu.variants)
    torch     torch.nn.functional.linear in the weight's type; for packed weights after dequantizing to bfloat16

An alternative counts only if a row's result is the same alone and among others, which the runtime promises, and if it is not
less accurate. The exit status is 1 if `native` is more than 10% slower than an alternative that counts, in three measurements
one after the other.

Terms: us = best time of one call. of bound = the least time for the bytes of weights at the measured read bandwidth, or for
the products at the measured peak of the instruction (all operands in registers), whichever is longer, divided by us. It is
above 1 where a weight is read from a cache. Products of a packed weight count twice where bytes are multiplied, because an
input is two bytes.

usage: python -m benchmarks.kernels --device cpu [--quick] [--json FILE]
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.machine import describe_machine, result_file
from quantkit.evaluation.speed import read_bandwidth
from quantkit.kernels.cpu import library
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.kernels.cpu.matmul import CpuWeight
from quantkit.kernels.cpu.variants import NATIVE, runnable

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 96, 128, 256, 512, 1024)
QUICK_ROWS = (1, 4, 16, 128)

#: [N, K]: the demo model's fused gate and up projection, and a square matrix that no cache of a core holds.
SHAPES = ((3072, 576), (2048, 2048))

PACKED_BITS = (2, 4, 8)
GROUP = 64
DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: How much slower than an alternative the choice may be.
ALLOWED = 1.1

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A weight and the ways to multiply with it.

    Attributes:
        layout: "4 bit", "bfloat16", ...
        weight: for the native kernels; exact: the same in float64, [N, K].
        ways: name -> product with x, float32 [M, K].
    """

    layout: str
    weight: CpuWeight
    exact: Tensor
    ways: dict[str, Product]


def with_library(lib: ctypes.CDLL, weight: CpuWeight) -> Product:
    """The product by one build of the kernels."""

    def product(x: Tensor) -> Tensor:
        return cpu_matmul.native_matmul(lib, x, weight, None)

    return product


def dequantized_product(weight: CpuWeight, x: Tensor) -> Tensor:
    """torch's product with a packed weight, dequantized to bfloat16 in each call: to keep it dense would take four times the
    memory of 4 bits."""
    return linear(x.to(torch.bfloat16), cpu_matmul.dequantize(weight, dtype=torch.bfloat16)).float()


def dense_product(weight: Tensor, x: Tensor) -> Tensor:
    """torch's product with a dense weight, in its type."""
    return linear(x.to(weight.dtype), weight).float()


def cases(shape: tuple[int, int]) -> list[Case]:
    """Every layout, with random numbers."""
    outputs, columns = shape
    builds = {"native": library.load_variant(NATIVE)}
    builds |= {name: library.load_variant(variant) for name, variant in runnable().items()}
    found: list[tuple[str, CpuWeight, dict[str, Product]]] = []
    for bits in PACKED_BITS:
        codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
        scales = torch.rand(outputs, columns // GROUP) * 0.01 + 0.005
        zeros = torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8)
        weight = cpu_matmul.pack(codes, scales.half().float(), zeros, bits, GROUP)
        found.append((f"{bits} bit", weight, {"torch": partial(dequantized_product, weight)}))
    for name, dtype in DENSE.items():
        dense = torch.randn(shape).to(dtype)
        found.append((name, cpu_matmul.pack_dense(dense), {"torch": partial(dense_product, dense)}))
    return [
        Case(
            layout,
            weight,
            cpu_matmul.dequantize(weight).double(),
            {name: with_library(lib, weight) for name, lib in builds.items()} | ways,
        )
        for layout, weight, ways in found
    ]


def countable(case: Case) -> dict[str, str]:
    """Name of each alternative -> why it does not count; empty if it does."""
    x = torch.randn(70, case.weight.shape[1])
    wanted = x.double() @ case.exact.T
    allowed = 2 * float((case.ways["native"](x).double() - wanted).abs().max())
    found = {}
    for name, way in case.ways.items():
        out = way(x)
        if float((out.double() - wanted).abs().max()) > allowed:
            found[name] = "less accurate"
        elif not all(torch.equal(way(x[i : i + 1])[0], out[i]) for i in (0, 33, 69)):
            found[name] = "another result alone"
        else:
            found[name] = ""
    return found


def best_times(ways: dict[str, Product], x: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of the best of `repeats` calls of each, in turn. Each timed call follows another of the same way, so that all
    find the caches alike. A way that takes twice as long as "native" at first is not called again."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            if best["native"] < float("inf") and 2 * best["native"] < best[name] < float("inf"):
                continue
            way(x)
            started = time.perf_counter()
            way(x)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def peaks() -> dict[str, float]:
    """Products per second of all threads with operands in registers: "float", "byte", "bfloat16"; 0 without instructions."""
    source = Path(__file__).parent / "peak.c"
    rates = {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "peak.so"
        flags = [*library._FLAGS, *NATIVE.flags, "-I", str(library._FOLDER)]
        subprocess.run([*library._compiler(), *flags, str(source), "-o", str(out)], check=True)
        lib = ctypes.CDLL(str(out))
    lib.peak_products.restype = ctypes.c_int64
    for kind, name in enumerate(("float", "byte", "bfloat16")):
        steps, each = 3_000_000, lib.peak_products(kind)
        started = time.perf_counter()
        lib.peak_loop(kind, ctypes.c_int64(steps), 1)
        rates[name] = each * steps / (time.perf_counter() - started) * torch.get_num_threads() if each else 0.0
    return rates


def bound_seconds(case: Case, rows: int, peak: dict[str, float], bandwidth: float) -> float:
    """The least time that one product needs on this machine; see the module's docstring."""
    products = rows * case.weight.shape[0] * case.weight.shape[1]
    if case.weight.layout == "tiles":
        rate = peak["byte"] / 2 or peak["float"]
    else:
        rate = peak["bfloat16"] if case.layout == "bfloat16" and peak["bfloat16"] else peak["float"]
    return max(products / rate, case.weight.nbytes / bandwidth)


def measure(case: Case, rows: int, counts: dict[str, str], peak: dict[str, float], bandwidth: float) -> dict[str, Any]:
    """One row of the table; measured up to three times as long as an alternative seems to be faster."""
    x = torch.randn(rows, case.weight.shape[1])
    for attempt in range(3):
        times = best_times(case.ways, x, (7, 15, 31)[attempt] if rows > 64 else (31, 61, 121)[attempt])
        rivals = {name: seconds for name, seconds in times.items() if name != "native" and not counts[name]}
        best = min(rivals, key=lambda name: rivals[name])
        if times["native"] <= ALLOWED * rivals[best]:
            break
    return {
        "layout": case.layout,
        "N": case.weight.shape[0],
        "K": case.weight.shape[1],
        "rows": rows,
        "us": round(times["native"] * 1e6, 1),
        "of bound": round(bound_seconds(case, rows, peak, bandwidth) / times["native"], 3),
        "best alternative": best,
        "times as long": round(times["native"] / rivals[best], 3),
        "all us": {name: round(seconds * 1e6, 1) for name, seconds in times.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    """Print each row when it is measured; then what is too slow, and the machine. Exit status 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four numbers of rows and the smaller shape only")
    parser.add_argument("--json", type=Path, help="write the results here; default: benchmarks/results")
    options = parser.parse_args(arguments)
    if library.load() is None:
        print("benchmarks.kernels: no C compiler was found, so there is nothing to compare", file=sys.stderr)
        raise SystemExit(2)
    machine = describe_machine()
    print(machine["name"], machine["flags"], sep="\n")
    peak, bandwidth = peaks(), read_bandwidth(torch.device("cpu"))
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s; peak", ", ".join(f"{k} {v / 1e9:.0f} G/s" for k, v in peak.items()))
    rows_measured, left_out = [], {}
    for shape in SHAPES[:1] if options.quick else SHAPES:
        for case in cases(shape):
            counts = countable(case)
            left_out[case.layout] = {name: reason for name, reason in counts.items() if reason}
            for rows in QUICK_ROWS if options.quick else ROWS:
                row = measure(case, rows, counts, peak, bandwidth)
                rows_measured.append(row)
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    slow = [row for row in rows_measured if row["times as long"] > ALLOWED]
    report = {
        "machine": machine,
        "command": "python -m benchmarks.kernels --device cpu",
        "peak G/s": {name: round(rate / 1e9, 1) for name, rate in peak.items()},
        "read GB/s": round(bandwidth / 1e9, 1),
        "alternatives that do not count": left_out,
        "rows": rows_measured,
        "slower than an alternative": slow,
    }
    file = options.json or result_file("kernels")
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for layout, reasons in left_out.items():
        print(f"{layout}: not counted:", "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "none")
    print(f"{len(slow)} of {len(rows_measured)} choices are more than 10% slower than an alternative on this machine")
    for row in slow:
        print(f"  {row['layout']} {row['N']}x{row['K']}, {row['rows']} rows: {row['best alternative']} is faster")
    raise SystemExit(1 if slow else 0)


if __name__ == "__main__":
    main()
