"""Fixtures for the tests of CPU kernels: each test runs with the native kernels, and again as if there were no compiler."""

import ctypes
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from quantkit.kernels.cpu import library, variants


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


@pytest.fixture(scope="session", params=[*variants.runnable(), "clang"])
def variant_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels, compiled for each kind of processor whose instructions this one has, and once by clang."""
    if request.param == "clang" and not shutil.which("clang"):
        pytest.skip("clang is not installed")
    variant = variants.runnable().get(request.param, variants.NATIVE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_CACHE", str(tmp_path_factory.getbasetemp() / "variants"))
        if request.param == "clang":
            patch.setenv("CC", "clang")
        try:
            return library.load_variant(replace(variant, flags=(*variant.flags, "-O2")))
        except OSError as error:
            if "unrecognized" in str(error) or "unknown argument" in str(error):
                pytest.skip(f"the compiler is too old: {error}")
            raise


@pytest.fixture
def variant(variant_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The test runs with each of the variants."""
    monkeypatch.setattr(library, "load", lambda: variant_library)
    return variant_library


def rounds_inputs() -> bool:
    """Whether the native kernels round the inputs of bfloat16 weights, because the processor multiplies bfloat16."""
    lib = library.load()
    return lib is not None and bool(lib.quantkit_rounds_inputs())
