"""Folding a channel scale into its producer does not change the function of a block, in every family and at every fold."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor

from helpers import tiny
from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods.rtn import rtn
from quantkit.methods.scheme import Scheme
from quantkit.models.families import FAMILIES, Fold, MatrixGroup
from quantkit.models.streaming import StreamedModel
from quantkit.quantization.fold_scales import QuantizedBlock, effective_scale, find_channel_groups, fold_scale

#: Name -> (family, what differs): every family, and the shapes that a fold could get wrong.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without repeated heads": ("llama", {"num_key_value_heads": 4}),
    "llama with one KV head": ("llama", {"num_key_value_heads": 1}),
    "phi3 with one KV head": ("phi3", {"num_key_value_heads": 1}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}),
}


def _folds(wanted: Callable[[str, Fold], bool]) -> list[ParameterSet]:
    """(name, group) of every fold of every model that is `wanted`."""
    return [
        pytest.param(name, group, id=f"{name}: {group.names[0]}")
        for name, (family, _) in MODELS.items()
        for group in FAMILIES[family].groups
        if group.fold is not None and wanted(name, group.fold)
    ]


FOLDS = _folds(lambda name, fold: True)
#: One fold of each kind: a norm, a norm of (1 + w), a matrix, the rows of a fused one.
KINDS = _folds(lambda name, fold: name in ("llama", "gemma3_text", "phi3"))
QUANTIZED_PRODUCERS = _folds(lambda name, fold: "norm" not in fold.producer)
NORMS = _folds(lambda name, fold: "norm" in fold.producer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each model lies."""
    root = tmp_path_factory.mktemp("folds")
    return {
        name: tiny.make_model(root / name.replace(" ", "-"), family, **options) for name, (family, options) in MODELS.items()
    }


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Scene:
    """Block 1 of a model and hidden states that enter it."""

    def __init__(self, folder: Path, group: MatrixGroup) -> None:
        checkpoint = Checkpoint(folder)
        assert group.fold is not None
        self.group, self.fold = group, group.fold
        self.model = StreamedModel(checkpoint, checkpoint.read, torch.float32, torch.device("cpu"))
        tokens = torch.randint(tiny.VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
        self.hidden, kwargs = self.model.embed(tokens)
        self.kwargs = kwargs[1]
        with self.model.block(1) as block:
            self.state = {name: value.clone() for name, value in block.named_parameters()}

    def output(self, changes: dict[str, Tensor]) -> Tensor:
        """What the block gives, some parameters replaced."""
        with self.model.block(1) as block:
            block.load_state_dict(changes, strict=False, assign=True)
            out = block(self.hidden, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def scale(self, spread: float) -> tuple[Tensor, Tensor]:
        """A random scale of the group's input, and which of its channels share theirs."""
        columns = self.state[f"{self.group.names[0]}.weight"].shape[1]
        channel_groups = find_channel_groups(self.fold, columns, self.model.config)
        free = torch.randn(columns, generator=torch.Generator().manual_seed(1)).mul_(spread).exp_()
        return free[channel_groups], channel_groups

    def folded(
        self, scale: Tensor, channel_groups: Tensor, dtype: torch.dtype, quantize: Scheme | None = None
    ) -> dict[str, Tensor]:
        """The parameters that change when the fold is written: the producer's, and the group's matrices."""
        producer = f"{self.fold.producer}.weight"
        written = QuantizedBlock({}, {name: value.to(dtype) for name, value in self.state.items()})
        if quantize is not None:
            written.quantized[self.fold.producer] = rtn(written.unquantized.pop(producer).float(), quantize, dtype)
        with self.model.block(1) as block:
            acting = effective_scale(self.fold, block, scale, dtype)
            fold_scale(self.fold, block, acting, channel_groups, written, dtype)
        changes = {name: value.float() for name, value in written.unquantized.items() if name.startswith(self.fold.producer)}
        if quantize is not None:
            changes[producer] = written.quantized[self.fold.producer].dequantize()
        return changes | {f"{name}.weight": self.state[f"{name}.weight"] * acting for name in self.group.names}


def _assert_same(found: Tensor, expected: Tensor) -> None:
    # A fold adds one rounding of float32 to each of the at most 128 products of a sum: 2^-24 * sqrt(128) of the largest
    # value, a hundred times that for what the softmax makes of it.
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(("name", "group"), FOLDS)
def test_a_fold_changes_nothing(folders: dict[str, Path], name: str, group: MatrixGroup) -> None:
    scene = Scene(folders[name], group)
    scale, channel_groups = scene.scale(spread=0.7)
    changes = scene.folded(scale, channel_groups, torch.float32)
    _assert_same(scene.output(changes), scene.output({}))
    # Half a fold is a different model: the scale is no trifle, and both sides carry it.
    for side in (scene.fold.producer, group.names[0]):
        half = {key: value for key, value in changes.items() if not key.startswith(side)}
        assert float((scene.output(half) - scene.output({})).abs().max()) > 1e-2


@pytest.mark.parametrize(("name", "group"), QUANTIZED_PRODUCERS)
def test_a_fold_into_grid_scales_changes_nothing(folders: dict[str, Path], name: str, group: MatrixGroup) -> None:
    scene, scheme = Scene(folders[name], group), Scheme(4, 16, False)
    _, channel_groups = scene.scale(spread=0.7)
    # Powers of two, so that the stored grid scales stay exact.
    scale = 2.0 ** torch.randint(-2, 3, (len(channel_groups),), generator=torch.Generator().manual_seed(2))[channel_groups]
    producer = f"{scene.fold.producer}.weight"
    expected = scene.output({producer: rtn(scene.state[producer], scheme, torch.float32).dequantize()})
    _assert_same(scene.output(scene.folded(scale, channel_groups, torch.float32, scheme)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "group"), [param for param in QUANTIZED_PRODUCERS if param in KINDS])
def test_grid_scales_are_rounded_once(folders: dict[str, Path], name: str, group: MatrixGroup, dtype: torch.dtype) -> None:
    scene, scheme = Scene(folders[name], group), Scheme(4, 16, False)
    scale, channel_groups = scene.scale(spread=0.7)
    producer = f"{scene.fold.producer}.weight"
    before = rtn(scene.state[producer].to(dtype).float(), scheme, dtype).dequantize()
    after = scene.folded(scale, channel_groups, dtype, scheme)[producer]
    divisor = torch.ones(len(before))
    divisor[len(before) - int(channel_groups.max()) - 1 :][channel_groups] = scale
    # Half a unit in the last place of bfloat16, or of float16.
    limit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(after * divisor[:, None], before, rtol=limit, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "group"), NORMS)
def test_a_norm_in_16_bit_divides_by_the_acting_scale(
    folders: dict[str, Path], name: str, group: MatrixGroup, dtype: torch.dtype
) -> None:
    # The norm's new weight is rounded to 16 bit; the scale that the matrices are multiplied by makes up for that.
    scene = Scene(folders[name], group)
    norm = f"{scene.fold.producer}.weight"
    scene.state[norm] = scene.state[norm].to(dtype).float()
    scale, channel_groups = scene.scale(spread=0.7)
    with scene.model.block(1) as block:
        block.load_state_dict(scene.state, strict=False, assign=True)
        acting = effective_scale(scene.fold, block, scale, dtype)
        written = QuantizedBlock({}, {})
        fold_scale(scene.fold, block, acting, channel_groups, written, dtype)
    assert written.unquantized[norm].dtype == dtype
    new, old = written.unquantized[norm].float() + scene.fold.offset, scene.state[norm] + scene.fold.offset
    torch.testing.assert_close(new * acting, old, rtol=1e-6, atol=1e-6)
    # Where the weight is not tiny, what acts is what was asked for, up to the rounding.
    torch.testing.assert_close(acting[old > 0.5], scale[old > 0.5], rtol=2.0**-5, atol=0)


def test_a_dead_norm_channel_takes_no_scale(folders: dict[str, Path]) -> None:
    group = FAMILIES["llama"].groups[0]
    scene = Scene(folders["llama"], group)
    norm = f"{scene.fold.producer}.weight"
    scene.state[norm][:2] = torch.tensor([0.0, -0.5])
    with scene.model.block(1) as block:
        block.load_state_dict(scene.state, strict=False, assign=True)
        acting = effective_scale(scene.fold, block, torch.full((64,), 3.0), torch.bfloat16)
    # 0 / 3 is 0 for any scale; a negative weight folds like any other.
    assert float(acting[0]) == 1
    assert float(acting[1]) == pytest.approx(3, rel=2.0**-8)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_query_heads_of_one_kv_head_are_tied(folders: dict[str, Path], heads: int, kv_heads: int) -> None:
    name = {4: "llama without repeated heads", 2: "llama", 1: "llama with one KV head"}[kv_heads]
    scene = Scene(folders[name], FAMILIES["llama"].groups[1])
    channel_groups = find_channel_groups(scene.fold, 64, scene.model.config).view(heads, 16)
    expected = torch.arange(16 * kv_heads).view(kv_heads, 16).repeat_interleave(heads // kv_heads, 0)
    assert torch.equal(channel_groups, expected)
