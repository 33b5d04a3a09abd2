"""Time the GPU kernels: the matmul with packed weights at the linear layers of Llama 3 8B and 70B, then paged attention.
Without a GPU, or with --device cpu, time the CPU's kernels instead and check the choice among them (benchmarks.cpu_kernels).

Terms: us = median time of one call, replayed from a CUDA graph with the L2 cache flushed before each call. GB/s = bytes of
packed weights, scales, zero points and activations, each counted once, per us. of copy = GB/s, as a fraction of the bandwidth
(read + written) of copying 1 GiB on the same device. times dense = time of torch.nn.functional.linear with the same weights in
16 bit, divided by us. times gemlite = the same for gemlite (4 bits), if it is installed. Results are compared before they are
timed. Configs are tuned on first use and kept under $QUANTKIT_CACHE. For attention see benchmarks.attention.

Goals: at 1 row, 0.75 of copy and 3 times dense; at any number of rows, at least 0.95 times dense.

usage: python -m benchmarks.kernels [--device cpu] [--dtype bfloat16] [--bits 4] [--group 128] [--skip-attention] [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import attention, cpu_kernels
from benchmarks.attention import Row, copy_bandwidth, microseconds

#: Name -> [N, K]. q, k and v are fused into one matrix, and so are gate and up.
SHAPES = {
    "8b qkv": (6144, 4096),
    "8b o": (4096, 4096),
    "8b gate+up": (28672, 4096),
    "8b down": (4096, 14336),
    "70b qkv": (10240, 8192),
    "70b o": (8192, 8192),
    "70b gate+up": (57344, 8192),
    "70b down": (8192, 28672),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)


Matmul = Callable[[Tensor], Tensor]


def gemlite_matmul(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int) -> Matmul:
    """The product by gemlite's layer with the same weight."""
    from gemlite import helper

    maker = helper.A16Wn(device="cuda", dtype=scales.dtype)
    forward: Matmul = maker.from_weights(codes, scales, zeros.to(scales.dtype), bits, group).forward
    return forward


def matmuls(shape: tuple[int, int], dtype: torch.dtype, bits: int, group: int, device: str) -> tuple[int, dict[str, Matmul]]:
    """Bytes of a random packed weight [N, K], and the implementations that multiply with it, by name."""
    from quantkit.kernels.gpu.matmul.dequant_matmul import dequant_matmul
    from quantkit.kernels.gpu.matmul.dequantize import dequantize
    from quantkit.kernels.layouts.planes import to_planes

    outputs, columns = shape
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, device=device)
    scales = (torch.rand(outputs, columns // group, device=device) * 0.01 + 0.005).to(dtype)
    zeros = torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8, device=device)
    weight = to_planes(codes, scales, zeros, bits, group, dtype)
    dense = dequantize(weight, dtype)
    implementations: dict[str, Matmul] = {
        "packed": lambda x: dequant_matmul(x, weight),
        "dense": lambda x: torch.nn.functional.linear(x, dense),
    }
    if bits == 4 and find_spec("gemlite"):
        implementations["gemlite"] = gemlite_matmul(codes, scales, zeros, bits, group)
    return weight.nbytes, implementations


def matmul_rows(dtype: torch.dtype, bits: int, group: int, copy: float, device: str = "cuda") -> Iterator[Row]:
    """The rows of the matmul table, each as soon as it is measured; `copy` is the device's copy bandwidth in GB/s."""
    for name, shape in SHAPES.items():
        nbytes, implementations = matmuls(shape, dtype, bits, group, device)
        for rows in ROWS:
            x = torch.randn(rows, shape[1], dtype=dtype, device=device)
            assert_same({way: run(x) for way, run in implementations.items()})
            times = {way: microseconds(partial(run, x)) for way, run in implementations.items()}
            rate = (nbytes + x.nbytes) / 1e3 / times["packed"]
            yield {
                "operation": "matmul",
                "layer": name,
                "bits": bits,
                "group": group,
                "rows": rows,
                "dtype": str(dtype).removeprefix("torch."),
                "us": round(times["packed"], 2),
                "GB/s": round(rate, 1),
                "of copy": round(rate / copy, 3),
                **{f"times {other}": round(us / times["packed"], 2) for other, us in times.items() if other != "packed"},
            }


def assert_same(results: dict[str, Tensor]) -> None:
    """Assert that all results agree within 2% of the largest value. The tests check accuracy; this only keeps wrong kernels
    from being timed."""
    wanted = results["dense"].float()
    for name, result in results.items():
        worst = (result.float() - wanted).abs().max() / wanted.abs().max()
        assert worst < 0.02, f"{name} is off by {worst:.3g} of the largest value"


def _number(column: str, row: Row) -> float:
    return float(row[column])


def goals(rows: list[Row]) -> dict[str, str]:
    """For each goal, whether it is met, and the worst of the matmul's rows."""
    one = [row for row in rows if row["rows"] == 1]
    cases = {
        "1 row, of copy, 0.75": (one, "of copy", 0.75),
        "1 row, times dense, 3": (one, "times dense", 3.0),
        "any rows, times dense, 0.95": (rows, "times dense", 0.95),
    }
    found = {}
    for name, (among, column, wanted) in cases.items():
        worst = min(among, key=partial(_number, column))
        verdict = "met" if float(worst[column]) >= wanted else "missed"
        found[name] = f"{verdict}: worst {worst[column]} ({worst['layer']}, {worst['rows']} rows)"
    return found


def main() -> None:
    """Print each row when it is measured, then the goals, then everything as JSON; write the JSON to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 8], default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--skip-attention", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results here; default: benchmarks/results/<device>.json")
    options, rest = parser.parse_known_args()
    if options.device == "cpu":
        cpu_kernels.main(rest + (["--json", str(options.json)] if options.json else []))
    if rest:
        parser.error(f"unknown options: {' '.join(rest)}")
    if not torch.cuda.is_available():
        print("benchmarks.kernels: no CUDA device; run it on a machine with an NVIDIA GPU", file=sys.stderr)
        raise SystemExit(2)
    dtype, copy = getattr(torch, options.dtype), copy_bandwidth()
    matmul = _shown(matmul_rows(dtype, options.bits, options.group, copy))
    reached = goals(matmul)
    print(*(f"{name}: {verdict}" for name, verdict in reached.items()), sep="\n")
    others = [] if options.skip_attention else _shown(attention.rows(dtype, copy))
    device = torch.cuda.get_device_name()
    versions = {name: version(name) for name in ("torch", "triton", "gemlite") if find_spec(name)}
    report = {"device": device, "versions": versions, "copy GB/s": round(copy, 1), "goals": reached, "rows": matmul + others}
    file = options.json or Path(__file__).parent / "results" / f"{device.replace(' ', '-').replace('/', '-')}.json"
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _shown(rows: Iterator[Row]) -> list[Row]:
    found = []
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
