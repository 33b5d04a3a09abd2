"""The kernels for Arm processors, cross-compiled and emulated, against those for the processor at hand.

Needs a cross compiler and an emulator: Debian's packages gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user-static.
"""

import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.matmul_samples import SHAPES, Weight, make_dense, make_rows, make_weight, packed_weight
from helpers.paged_samples import Batch, Heads, assert_attends, make_batch
from helpers.quantized_samples import SCALE
from quantkit.kernels.cpu import library, structs
from quantkit.kernels.cpu import matmul as cpu_matmul
from quantkit.kernels.cpu.variants import VARIANTS
from quantkit.kernels.cpu.w4a8 import w4a8_matmul

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
ROWS = [1, 3, 7]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(not (COMPILER and EMULATOR), reason="no cross compiler or no emulator")


@pytest.fixture(scope="module", params=VARIANTS["aarch64"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run_kernels.c and the kernels, compiled for each kind of Arm processor."""
    path = tmp_path_factory.mktemp("arm") / "run-kernels"
    sources = [Path(__file__).parent / "run_kernels.c", *(library._FOLDER / name for name in library._SOURCES)]
    flags = [flag for flag in library._FLAGS if flag not in ("-fPIC", "-shared", "-fvisibility=hidden")]
    flags += [*library._GCC_FLAGS, *VARIANTS["aarch64"][request.param].flags, "-O2", "-static", "-fopenmp", "-w"]
    assert COMPILER
    command = [COMPILER, *flags, f"-I{library._FOLDER}", *map(str, sources), "-o", str(path), "-lm"]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    return path


def _bytes(*tensors: Tensor) -> bytes:
    return b"".join(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)


def _run(program: Path, calls: list[bytes], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The results of calls as run_kernels.c reads them."""
    command = [str(EMULATOR), "-cpu", "max", str(program)]
    out = subprocess.run(command, input=b"".join(calls), stdout=subprocess.PIPE, check=True, timeout=600).stdout
    results = torch.frombuffer(bytearray(out), dtype=torch.float32)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    assert len(results) == sum(sizes)
    return [part.view(shape) for part, shape in zip(results.split(sizes), shapes, strict=True)]


def _packed_call(x: Tensor, weight: Weight, activation_bits: int) -> bytes:
    rows, columns = weight.codes.shape
    group = columns if weight.group == -1 else weight.group
    own_zeros = int((weight.zeros != weight.zeros[0, 0]).any())
    sizes = [0, len(x), rows, columns, group, weight.bits, structs.TYPES[torch.float32], activation_bits, own_zeros]
    return _bytes(torch.tensor(sizes), weight.codes, weight.scales, weight.zeros, x)


def test_packed_products_have_the_same_bits(program: Path) -> None:
    """As on the processor at hand, whichever instructions multiply integers."""
    calls, wanted = [], []
    for shape in SHAPES:
        for bits in (2, 4, 8):
            for symmetric in (False, True):
                weight = make_weight(*shape, bits, symmetric)
                packed = packed_weight(weight)
                for x in (make_rows(rows, shape[1]) for rows in ROWS):
                    calls += [_packed_call(x, weight, 0), _packed_call(x, weight, 8)]
                    wanted += [cpu_matmul.matmul(x, packed), w4a8_matmul(x, packed, 8)]
    found = _run(program, calls, [tuple(each.shape) for each in wanted])
    assert [torch.equal(one, other) for one, other in zip(found, wanted, strict=True)] == [True] * len(wanted)


def test_the_largest_sums_fit(program: Path) -> None:
    """All codes, zero points and inputs are extreme. Eight sums of a row are exact; they are added in float32."""
    calls, wanted = [], []
    for bits in (2, 4, 8):
        for zero in (0, (1 << bits) - 1):
            codes = torch.full((32, 2048), (1 << bits) - 1 - zero, dtype=torch.uint8)
            weight = Weight(codes, torch.ones(32, 2), torch.full((32, 2), zero, dtype=torch.uint8), bits, 1024)
            for sign in (1, -1):
                calls += [_packed_call(torch.full((4, 2048), 32767.0 * sign), weight, 0)]
                wanted += [32767.0 * sign * ((1 << bits) - 1 - 2 * zero) * 2048]
    for found, value in zip(_run(program, calls, [(4, 32)] * len(calls)), wanted, strict=True):
        assert bool(((found - value).abs() <= 8 * 2.0**-24 * abs(value)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_products_are_sums_of_floats(program: Path, dtype: torch.dtype) -> None:
    weights = [make_dense(*shape, dtype) for shape in ((33, 64), (50, 101), (7, 13), (1, 1), (11, 2500))]
    samples = [(make_rows(7, weight.shape[1])[:rows], weight) for weight in weights for rows in ROWS]
    calls = [
        _bytes(torch.tensor([0, len(x), *weight.shape, weight.shape[1], 0, structs.TYPES[dtype], 0, 0]), weight, x)
        for x, weight in samples
    ]
    results = _run(program, calls, [(len(x), len(weight)) for x, weight in samples])
    for (x, weight), found in zip(samples, results, strict=True):
        # float32 sums: at most K roundings of 2^-24 of the sum of magnitudes.
        bound = x.shape[1] * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
        assert bool(((found.double() - x.double() @ weight.double().T).abs() <= bound).all())
    for first in range(0, len(results), len(ROWS)):
        one, some, all_rows = results[first : first + len(ROWS)]
        assert torch.equal(some, all_rows[: len(some)]), "a row depends on other rows"
        assert torch.equal(one, all_rows[:1]), "a row depends on other rows"


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(program: Path, dtype: torch.dtype) -> None:
    batch = make_batch([200, 90], [1, 20], Heads(3, 3, 64, 48), dtype=dtype)
    batch = Batch(*(getattr(batch, field.name).cpu() for field in fields(batch)))
    blocks, block_size, heads, value_dim = batch.value_cache.shape
    query_heads, dim = batch.query.shape[1:]
    sizes = [1, query_heads, heads, dim, value_dim, structs.TYPES[dtype], *batch.block_table.shape, block_size, blocks]
    tables = (batch.block_table, batch.query_start, batch.seq_lens)
    call = _bytes(torch.tensor(sizes), *tables, batch.key_cache, batch.value_cache, batch.query.float())
    (out,) = _run(program, [call], [(len(batch.query), query_heads, value_dim)])
    assert_attends(out.to(dtype), batch, scale=SCALE)
