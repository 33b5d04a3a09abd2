"""The lockstep walk is the block's own forward: same outputs, same inputs, whatever is held, changed or divided on the way."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from helpers import tiny
from quantkit.checkpoint.reader import Checkpoint
from quantkit.methods import METHODS
from quantkit.methods.base import SolverSettings
from quantkit.methods.scheme import Scheme
from quantkit.models.families import MatrixGroup
from quantkit.models.streaming import StreamedModel
from quantkit.quantization.block import BlockQuantizer
from quantkit.quantization.calibration import ActivationStream, LockstepForward
from quantkit.quantization.report import MatrixReport

FAMILIES = list(tiny.FAMILIES)
KEEP_PAUSED = pytest.mark.parametrize("keep_paused", [True, False], ids=["paused", "again"])


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Scene:
    """Block 1 of a tiny model, its matrices' weights, and what enters it: three micro-batches, the last one smaller."""

    block: nn.Module
    groups: tuple[MatrixGroup, ...]
    hidden: list[Tensor]
    kwargs: Callable[[int], dict[str, Any]]
    originals: dict[str, Tensor]
    config: PreTrainedConfig

    def forward(self, hidden: Tensor) -> Tensor:
        """The block as transformers runs it."""
        out = self.block(hidden, **self.kwargs(len(hidden)))
        return out[0] if isinstance(out, tuple) else out

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Put `weights` into the block."""
        for name, weight in weights.items():
            self.block.get_submodule(name).weight.data = weight

    def lockstep(self, *streams: ActivationStream, keep_paused: bool) -> LockstepForward:
        """A walk through the block."""
        return LockstepForward(self.block, self.groups, streams, self.kwargs, keep_paused=keep_paused)


def _scene(folder: Path, family: str) -> Iterator[Scene]:
    checkpoint = Checkpoint(tiny.make_model(folder, family))
    model = StreamedModel(checkpoint, checkpoint.read, torch.float32, torch.device("cpu"))
    # 48 tokens are longer than the sliding windows of the families that have them.
    tokens = torch.randint(tiny.VOCAB, (5, 48), generator=torch.Generator().manual_seed(0))
    hidden, _ = model.embed(tokens)
    kwargs = {rows: model.embed(tokens[:rows])[1][1] for rows in (1, 2)}
    with model.block(1) as block:
        originals = {name: block.get_parameter(f"{name}.weight").clone() for name in model.family.matrices}
        yield Scene(block, model.family.groups, list(hidden.split(2)), lambda rows: kwargs[rows], originals, model.config)


@pytest.fixture(params=FAMILIES)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """Block 1 of every family."""
    yield from _scene(tmp_path, request.param)


@pytest.fixture
def llama_scene(tmp_path: Path) -> Iterator[Scene]:
    """Block 1 of a llama, where the family does not matter."""
    yield from _scene(tmp_path, "llama")


def _noisy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: w + 0.1 * torch.randn(w.shape, generator=generator) * w.std() for name, w in weights.items()}


@KEEP_PAUSED
def test_unchanged_weights_give_the_plain_forward(scene: Scene, keep_paused: bool) -> None:
    expected = [scene.forward(hidden) for hidden in scene.hidden]
    with scene.lockstep(ActivationStream(scene.hidden), keep_paused=keep_paused) as lockstep:
        for number in range(len(scene.groups)):
            assert len(list(lockstep.inputs(number))) == 3
        found = [output for (output,) in lockstep.outputs()]
    assert all(map(torch.equal, found, expected))
    assert len(found) == 3


@KEEP_PAUSED
def test_stops_see_what_a_plain_hook_sees_in_run_order(scene: Scene, keep_paused: bool) -> None:
    seen: list[tuple[str, Tensor]] = []
    names = [name for group in scene.groups for name in group.names]

    def record(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append((name, args[0].clone()))

    hooks = [scene.block.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in names]
    scene.forward(scene.hidden[0])
    for hook in hooks:
        hook.remove()
    assert [name for name, _ in seen] == names
    inputs = dict(seen)
    with scene.lockstep(ActivationStream(scene.hidden[:1]), keep_paused=keep_paused) as lockstep:
        for number, group in enumerate(scene.groups):
            ((stopped,),) = lockstep.inputs(number)
            # Every matrix of a group reads the very same input: one stop and one Hessian stand for all of them.
            assert all(torch.equal(stopped, inputs[name]) for name in group.names)


def _changing_walk(scene: Scene, keep_paused: bool) -> tuple[list[Tensor], list[Tensor]]:
    """All inputs and outputs of a `LockstepForward` that replaces all weights and divides the inputs of groups with a fold."""
    stream, second = ActivationStream(scene.hidden), ActivationStream(scene.hidden[:2])
    changed = _noisy(scene.originals)
    seen = []
    with scene.lockstep(stream, second, keep_paused=keep_paused) as lockstep:
        stream.weights, second.weights = dict(scene.originals), dict(scene.originals)
        for number, group in enumerate(scene.groups):
            seen += [value.clone() for values in lockstep.inputs(number) for value in values]
            scale = torch.ones(())
            if group.fold is not None:
                scale = torch.linspace(0.5, 2, seen[-1].shape[-1])
                lockstep.divide_input(number, scale)
            stream.weights |= {name: changed[name] * scale for name in group.names}
            second.weights |= {name: scene.originals[name] * scale for name in group.names}
        outputs = [value for values in lockstep.outputs() for value in values]
    return seen, outputs


def test_holding_and_running_again_agree_to_the_bit(scene: Scene) -> None:
    (held_inputs, held_outputs), (inputs, outputs) = (
        _changing_walk(scene, keep_paused=True),
        _changing_walk(scene, keep_paused=False),
    )
    assert len(inputs) == 5 * len(scene.groups)
    assert all(map(torch.equal, held_inputs, inputs))
    assert all(map(torch.equal, held_outputs, outputs))


@KEEP_PAUSED
def test_two_streams_keep_their_own_weights(scene: Scene, keep_paused: bool) -> None:
    _, outputs = _changing_walk(scene, keep_paused)
    first, second = [outputs[0], outputs[2], outputs[4]], [outputs[1], outputs[3]]
    for weights, found in ((_noisy(scene.originals), first), (scene.originals, second)):
        scene.set_weights(weights)
        for hidden, output in zip(scene.hidden, found, strict=False):
            # Dividing an input and multiplying its matrix costs two roundings of float32 a product.
            torch.testing.assert_close(output, scene.forward(hidden), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first[0], second[0], rtol=1e-2, atol=1e-2)


@KEEP_PAUSED
def test_a_group_sees_the_groups_before_it_changed(llama_scene: Scene, keep_paused: bool) -> None:
    scene, stream = llama_scene, ActivationStream(llama_scene.hidden)
    with scene.lockstep(stream, keep_paused=keep_paused) as lockstep:
        list(lockstep.inputs(0))
        stream.weights["self_attn.v_proj"] = torch.zeros_like(scene.originals["self_attn.v_proj"])
        assert all(not value.any() for (value,) in lockstep.inputs(1))
        # An attention of zeros leaves the residual stream alone.
        for (value,), hidden in zip(lockstep.inputs(2), scene.hidden, strict=True):
            assert torch.equal(value, scene.block.get_submodule("post_attention_layernorm")(hidden))


def _hooks(block: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in block.modules())


@KEEP_PAUSED
@pytest.mark.parametrize("stops", [0, 1, 3])
def test_leaving_early_leaves_nothing_behind(llama_scene: Scene, keep_paused: bool, stops: int) -> None:
    scene, seen = llama_scene, []
    expected = scene.forward(scene.hidden[0])
    with scene.lockstep(ActivationStream(scene.hidden), keep_paused=keep_paused) as lockstep:
        for number in range(stops):
            # Only the first micro-batch gets there: the others have not even started.
            (value,) = next(lockstep.inputs(number))
            seen.append(weakref.ref(value))
            del value
    assert _hooks(scene.block) == 0
    # Nor do paused forwards keep their tensors alive.
    assert all(reference() is None for reference in seen)
    assert torch.equal(scene.forward(scene.hidden[0]), expected)


@KEEP_PAUSED
def test_an_error_inside_the_walk_leaves_nothing_behind(llama_scene: Scene, keep_paused: bool) -> None:
    scene = llama_scene

    def fail() -> None:
        with scene.lockstep(ActivationStream(scene.hidden), keep_paused=keep_paused) as lockstep:
            list(lockstep.inputs(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert _hooks(scene.block) == 0


@KEEP_PAUSED
def test_an_error_inside_the_block_reaches_the_caller(llama_scene: Scene, keep_paused: bool) -> None:
    scene = llama_scene
    with (
        scene.lockstep(ActivationStream([torch.ones(1, 48, 7)]), keep_paused=keep_paused) as lockstep,
        pytest.raises(RuntimeError, match="size of tensor"),
    ):
        list(lockstep.inputs(0))
    assert _hooks(scene.block) == 0


def test_only_active_groups_stop(llama_scene: Scene) -> None:
    scene = llama_scene
    expected = [scene.forward(hidden) for hidden in scene.hidden]
    last = scene.groups[-1:]
    with LockstepForward(scene.block, last, [ActivationStream(scene.hidden)], scene.kwargs, keep_paused=True) as lockstep:
        assert [value.shape[-1] for (value,) in lockstep.inputs(0)] == [128] * 3
        assert all(map(torch.equal, (output for (output,) in lockstep.outputs()), expected))


def test_what_waits_lies_in_one_place(llama_scene: Scene) -> None:
    scene = llama_scene
    with scene.lockstep(ActivationStream(scene.hidden), ActivationStream(scene.hidden[:2]), keep_paused=True) as lockstep:
        lies = [
            [value.untyped_storage().data_ptr() for values in lockstep.inputs(number) for value in values]
            for number in range(4)
        ]
        (outputs, *_) = zip(*lockstep.outputs(), strict=False)
    assert len({pointer for group in lies for pointer in group}) == 1
    assert outputs[0].untyped_storage().data_ptr() != lies[0][0]


def test_hidden_states_are_not_modified(scene: Scene) -> None:
    before = [hidden.clone() for hidden in scene.hidden]
    _changing_walk(scene, keep_paused=True)
    assert all(map(torch.equal, scene.hidden, before))


def _job(scene: Scene, method: str, bits: int, keep_paused: bool) -> tuple[BlockQuantizer, list[Tensor], list[MatrixReport]]:
    """Quantize the block. Returns what was written, and the outputs that would calibrate the next block."""
    reports: list[MatrixReport] = []
    settings = SolverSettings(
        METHODS[method],
        act_order=True,
        damping=0.01,
        asymmetric_calibration=0.5,
        coordinate_descent_passes=1,
        dtype=torch.float32,
    )
    schemes = {name: Scheme(bits, 16, True) for name in scene.originals}
    job = BlockQuantizer(scene.block, "model.layers.1.", schemes, scene.config, settings, reports.append)
    plain = {name: value for name, value in scene.block.named_parameters() if name.removesuffix(".weight") not in schemes}
    job.written.unquantized |= {name: value.detach().clone() for name, value in plain.items()}
    # Some channels far larger than others, so that AWQ finds something to scale.
    loud = torch.randn(64, generator=torch.Generator().manual_seed(0)).exp()
    streams = [ActivationStream([hidden * loud for hidden in scene.hidden])]
    with scene.lockstep(*streams, keep_paused=keep_paused) as lockstep:
        job.quantize(scene.groups, lockstep, streams)
        outputs = [output for (output,) in lockstep.outputs()]
    scene.hidden = list(streams[0].hidden)
    return job, outputs, reports


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return float(sum((a - b).square().sum() for a, b in zip(found, expected, strict=True)))


@KEEP_PAUSED
@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_the_walk_goes_on_with_what_is_written(scene: Scene, method: str, keep_paused: bool) -> None:
    job, outputs, reports = _job(scene, method, 3, keep_paused)
    assert [report.name for report in reports] == [f"model.layers.1.{name}" for name in scene.originals]
    assert method == "gptq" or any(report.scale_ratio for report in reports)
    scene.set_weights(scene.originals)
    before = [scene.forward(hidden) for hidden in scene.hidden]
    written = {f"{name}.weight": weight.dequantize() for name, weight in job.written.quantized.items()}
    scene.block.load_state_dict(job.written.unquantized | written, assign=True)
    after = [scene.forward(hidden) for hidden in scene.hidden]
    if method == "gptq":
        assert all(map(torch.equal, outputs, after))
    # A scale that is folded into a quantized matrix rounds its grid scales to 16 bit once more, 2^-9 of each value; three
    # bits lose a hundred times that, and what is squared here is a thousandth and less.
    assert _distance(outputs, after) < 1e-3 * _distance(before, after)


@pytest.mark.parametrize("method", ["awq", "gptq", "awq+gptq"])
def test_what_a_job_reports_is_what_the_outputs_lose(llama_scene: Scene, method: str) -> None:
    # Queries and keys: they are first, so their inputs are the original model's, and no later fold changes them.
    scene = llama_scene
    norm = scene.block.get_submodule("input_layernorm")
    job, _, reports = _job(scene, method, 4, keep_paused=True)
    old = torch.cat([norm(hidden) for hidden in scene.hidden]).flatten(0, 1).double()
    new = old / norm.get_parameter("weight").double() * job.written.unquantized["input_layernorm.weight"].double()
    for name, report in zip(("self_attn.q_proj", "self_attn.k_proj"), reports, strict=False):
        wanted = old @ scene.originals[name].double().T
        lost = new @ job.written.quantized[name].dequantize().double().T - wanted
        # Moments are sums of 240 tokens in float32, and a loss is the small difference of large ones.
        assert report.output_error == pytest.approx(float(lost.square().sum() / wanted.square().sum()), rel=1e-2)
