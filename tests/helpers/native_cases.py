"""Fixtures for the tests of CPU kernels: each test runs with the native kernels, and again as if there were no compiler."""

import ctypes
import platform
from collections.abc import Iterator

import pytest
import torch

from quantkit.kernels.cpu import library

#: Overrides -march=native. Fused multiply-adds stay, because results differ without them.
OLDEST = ("-march=armv8-a",) if platform.machine() in ("aarch64", "arm64") else ("-march=x86-64", "-mfma")


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels the test runs with."""
    if request.param == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    else:
        assert library.load() is not None, "the native kernels could not be built"
    return str(request.param)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Number of threads; torch's own setting is restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, built for an old processor, without instructions for products of bytes or 16-bit integers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_CACHE", str(tmp_path_factory.getbasetemp() / "narrow"))
        patch.setattr(library, "_FLAGS", (*library._FLAGS, "-O2", *OLDEST))
        lib = ctypes.CDLL(str(library._built()))
    lib.quantkit_prepared_floats.restype = ctypes.c_int64
    return lib


@pytest.fixture
def other_lanes(narrow: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs with the `narrow` kernels."""
    monkeypatch.setattr(library, "load", lambda: narrow)


def rounds_inputs() -> bool:
    """Whether the native kernels round the inputs of bfloat16 weights, because the processor multiplies bfloat16."""
    lib = library.load()
    return lib is not None and bool(lib.quantkit_rounds_inputs())
