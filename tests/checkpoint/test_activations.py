"""Hidden states between blocks: the same values in memory and on disk; only complete files count as saved."""

from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.activations import Activations
from quantkit.errors import ArtifactError

SHAPE = (4, 3, 5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

anywhere = pytest.mark.parametrize("in_memory", [True, False])


def values(dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + 60).view(SHAPE).to(dtype)


def saved(path: Path, dtype: torch.dtype = torch.float32, *, in_memory: bool = True) -> Activations:
    states = Activations.reserve(path, SHAPE, dtype, in_memory=in_memory)
    states.tensor.copy_(values(dtype))
    states.save()
    return states


@anywhere
@pytest.mark.parametrize("again_in_memory", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_as_saved(tmp_path: Path, dtype: torch.dtype, in_memory: bool, again_in_memory: bool) -> None:
    saved(tmp_path / "a", dtype, in_memory=in_memory)
    assert (tmp_path / "a").stat().st_size == 60 * dtype.itemsize
    again = Activations.load(tmp_path / "a", SHAPE, dtype, in_memory=again_in_memory)
    assert again.tensor.dtype == dtype
    assert again.tensor.equal(values(dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@anywhere
def test_next_boundary_is_written_row_by_row_while_this_one_is_read(tmp_path: Path, in_memory: bool) -> None:
    states = saved(tmp_path / "a", in_memory=in_memory)
    following = states.following(tmp_path / "b")
    for row in range(SHAPE[0]):
        following.tensor[row].copy_(states.tensor[row] + 100)
    following.save()
    assert Activations.load(tmp_path / "a", SHAPE, torch.float32, in_memory=True).tensor.equal(values())
    assert Activations.load(tmp_path / "b", SHAPE, torch.float32, in_memory=True).tensor.equal(values(start=100))


def test_memory_holds_one_boundary(tmp_path: Path) -> None:
    states = saved(tmp_path / "a")
    assert states.following(tmp_path / "b").tensor.data_ptr() == states.tensor.data_ptr()


@pytest.mark.parametrize("size", [0, 100, 1000])
@anywhere
def test_leftovers_do_not_disturb_a_new_boundary(tmp_path: Path, size: int, in_memory: bool) -> None:
    """A killed run may have made the file without giving it a size."""
    (tmp_path / "a").write_bytes(b"x" * size)
    saved(tmp_path / "a", in_memory=in_memory)
    assert Activations.load(tmp_path / "a", SHAPE, torch.float32, in_memory=in_memory).tensor.equal(values())


@pytest.mark.parametrize("size", [None, 0, 239, 241])
@anywhere
def test_what_was_not_saved_whole_is_not_loaded(tmp_path: Path, size: int | None, in_memory: bool) -> None:
    if size is not None:
        (tmp_path / "a").write_bytes(b"x" * size)
    with pytest.raises(ArtifactError, match="pass --overwrite"):
        Activations.load(tmp_path / "a", SHAPE, torch.float32, in_memory=in_memory)


def test_nothing_is_on_disk_before_it_is_saved(tmp_path: Path) -> None:
    Activations.reserve(tmp_path / "a", SHAPE, torch.float32, in_memory=True).tensor.fill_(1)
    assert not any(tmp_path.iterdir())
