"""In which dtype Hessians are multiplied."""

from typing import Any

import pytest
import torch

from helpers.method_samples import activations
from quantkit.kernels.cpu import gram
from quantkit.methods import products
from quantkit.methods.products import NativeProducts, TorchProducts, fastest_products, output_error, products_for

CPU = torch.device("cpu")


@pytest.mark.parametrize(("factor", "chosen"), [(0.5, torch.bfloat16), (0.9, torch.float32), (8.0, torch.float32)])
def test_the_kernel_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch, factor: float, chosen: torch.dtype) -> None:
    monkeypatch.setattr(gram, "supported", lambda: True)
    monkeypatch.setattr(products, "_seconds", lambda way: factor if isinstance(way, NativeProducts) else 1.0)
    assert fastest_products(torch.bfloat16, CPU) == chosen


@pytest.mark.parametrize(
    ("dtype", "device", "supported"),
    [
        (torch.bfloat16, "cpu", False),
        (torch.bfloat16, "cuda", True),
        (torch.float16, "cpu", True),
        (torch.float32, "cpu", True),
    ],
)
def test_where_there_is_no_choice_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, device: str, supported: bool
) -> None:
    monkeypatch.setattr(gram, "supported", lambda: supported)
    monkeypatch.setattr(products, "_seconds", None)
    assert fastest_products(dtype, torch.device(device)) == torch.float32


def test_measuring_comes_to_an_end() -> None:
    assert fastest_products(torch.bfloat16, CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "supported", "kind"),
    [
        (torch.bfloat16, True, NativeProducts),
        (torch.bfloat16, False, TorchProducts),  # a run that is continued on another machine
        (torch.float32, True, TorchProducts),
    ],
)
def test_who_multiplies(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, supported: bool, kind: type[Any]) -> None:
    monkeypatch.setattr(gram, "supported", lambda: supported)
    assert isinstance(products_for(dtype, CPU, [], []), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [7, 96, 100])
def test_output_error_in_slices(dtype: torch.dtype, columns: int) -> None:
    x, change = activations(columns), torch.randn(70, columns, generator=torch.Generator().manual_seed(0))
    expected = float((x.double() @ change.double().T).square().sum()) / len(x)
    found = output_error(change.split(32), x.T @ x / len(x), dtype)
    assert found == pytest.approx(expected, rel=1e-3)
