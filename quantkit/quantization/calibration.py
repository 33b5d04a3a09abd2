"""Run the calibration rows through a block in lockstep, stopping before every group of matrices.

GPTQ solves each group for the inputs that it gets once the groups before it are quantized ("true-sequential"). A plain loop
pays for that with one partial forward pass per group. Here, every micro-batch runs the block's own forward pass in a
greenlet, which pauses at the group's first matrix. When all micro-batches have arrived, the group is quantized, and all
continue with the new weights. So one block costs one forward pass, whatever its structure. If the paused tensors would not
fit into memory, the block runs again from its start for every group (`keep_paused=False`): slower, but only one micro-batch
is alive at a time.

There can be two streams: the activations of the quantized model and, if the method needs them, those of the original model
in the same places. The second stream has only a part of the rows, because it costs as much time and memory per row.

With several processes, each runs its own micro-batches, which are assigned in turn, and sends a group's inputs to the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from quantkit.models.families import MatrixGroup
from quantkit.quantization.distributed import SINGLE_PROCESS, ProcessGroup

#: Tokens that run through a block at once. Fixed, because the order of summation decides the last bits of the result.
MICRO_BATCH_TOKENS = 1024


@dataclass
class ActivationStream:
    """The activations of one version of the model: quantized or original.

    Attributes:
        hidden: the block's input [B, T, D] per micro-batch; never modified.
        weights: the weights of this version by module name. They are read at every stop, so replacing one takes effect at
            once.
    """

    hidden: Sequence[Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


class LockstepForward:
    """One block's forward pass over all micro-batches, which advance together.

    Usage: for each group in run order, read `inputs`, then change the streams' weights; at the end, read `outputs`.

    Attributes:
        groups: the groups before which it stops, in run order.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: tuple[MatrixGroup, ...],
        streams: Sequence[ActivationStream],
        kwargs: Callable[[int], dict[str, Any]],
        *,
        keep_paused: bool,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """
        Args:
            block: a decoder block on its device. Its forward pass takes hidden states and keyword arguments.
            groups: the groups before which to stop, in run order.
            streams: the first has all micro-batches, a second one the first few of them.
            kwargs: the block's keyword arguments as a function of the number of rows in a batch.
            keep_paused: keep every micro-batch paused between stops; otherwise run it again from the start for each stop.
                The results are the same to the bit.
            process_group: the processes among which micro-batches are distributed. All of them read all inputs.
        """
        self._block, self._streams, self._kwargs, self._keep_paused = block, streams, kwargs, keep_paused
        self.groups, self._process_group = groups, process_group
        self._modules = {name: _layer(block, name) for group in groups for name in group.names}
        self._divisors: dict[int, Tensor] = {}
        self._paused: dict[tuple[int, int], greenlet] = {}
        self._storage: dict[tuple[int, int], Tensor] = {}
        self._caller = getcurrent()

    def __enter__(self) -> "LockstepForward":
        self._hooks = [
            self._modules[group.names[0]].register_forward_pre_hook(partial(self._pause, number))
            for number, group in enumerate(self.groups)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for runner in self._paused.values():
            runner.throw(GreenletExit)
        self._paused.clear()
        self._storage.clear()

    def inputs(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """Per micro-batch, what group `number` reads, [B, T, K], in every stream that has the micro-batch.

        Call it once per group, in run order. The tensors are the ones that the group will read; `divide_input`
        changes them later, so do not keep them.
        """
        count, process_group = len(self._streams[0].hidden), self._process_group
        for first in range(0, count, process_group.size):
            own = first + process_group.rank
            # Run the own micro-batch first and only then wait for the others', so that a round's run at the same time.
            mine = tuple(self._advance(stream, own, number) for stream in self._streams_with(own))
            for owner, index in enumerate(range(first, min(first + process_group.size, count))):
                values = mine if index == own else self._receive_buffers(index, number)
                for value in values:
                    process_group.broadcast(value, owner)
                yield values
            del mine, values  # free them before the next round starts

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches."""
        return len(self._streams[0].hidden)

    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """Per micro-batch, the block's output [B, T, D] in every stream that has it, after the last group."""
        return self.inputs(len(self.groups))

    def divide_input(self, number: int, scale: Tensor) -> None:
        """From now on, divide the inputs of group `number` by `scale` [K], in every stream."""
        self._divisors[number] = scale

    def _streams_with(self, index: int) -> list[int]:
        """The streams that have micro-batch `index`."""
        return [k for k, stream in enumerate(self._streams) if index < len(stream.hidden)]

    def _receive_buffers(self, index: int, number: int) -> tuple[Tensor, ...]:
        """Empty tensors for the inputs of group `number` in a micro-batch that another process runs."""
        device = next(self._block.parameters()).device
        shapes = [self._streams[k].hidden[index].shape for k in self._streams_with(index)]
        dtype = self._streams[0].hidden[0].dtype
        widths = [
            self._modules[self.groups[number].names[0]].in_features if number < len(self.groups) else s[-1] for s in shapes
        ]
        return tuple(torch.empty(*s[:-1], k, dtype=dtype, device=device) for s, k in zip(shapes, widths, strict=True))

    def _pause(self, number: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._caller.switch(args[0])
        if number in self._divisors:
            args[0].div_(self._divisors[number].to(args[0].dtype))

    def _advance(self, stream: int, index: int, number: int) -> Tensor:
        """Run one micro-batch until it stops before group `number`, or to its end. Returns the group's input or the output."""
        for name, weight in self._streams[stream].weights.items():
            self._modules[name].weight.data = weight
        runner = self._paused.pop((stream, index), None)
        if runner is not None:
            value = runner.switch()
        else:
            runner = greenlet(self._forward)
            value = runner.switch(self._streams[stream].hidden[index])
            for _ in range(number):
                value = runner.switch()
        if self._keep_paused and not runner.dead:
            self._paused[stream, index] = runner
            self._compact(stream, index, number, value)
        elif not runner.dead:
            runner.throw(GreenletExit)
        assert isinstance(value, Tensor)
        return value

    def _compact(self, stream: int, index: int, number: int, value: Tensor) -> None:
        """Move the input of group `number` into the micro-batch's own part of one large tensor.

        Otherwise it would stay among the forward pass's short-lived tensors and fragment the memory that the next
        micro-batches need. If an input can be divided for a group, nothing else reads it. So its part of the large tensor can
        be reused as soon as the group has run, even if frames of the block still refer to it.
        """
        if self.groups[number].fold is None:
            return
        if not self._storage:
            widest = max(module.in_features for module in self._modules.values())
            mine = slice(self._process_group.rank, None, self._process_group.size)
            tokens = [hidden.shape[0] * hidden.shape[1] for s in self._streams for hidden in s.hidden[mine]]
            places = torch.empty(sum(tokens), widest, dtype=value.dtype, device=value.device).split(tokens)
            keys = [(k, i) for k, s in enumerate(self._streams) for i in range(len(s.hidden))[mine]]
            self._storage = dict(zip(keys, places, strict=True))
        place = self._storage[stream, index].view(-1)[: value.numel()].view(value.shape)
        value.data = place.copy_(value)

    def _forward(self, hidden: Tensor) -> Tensor:
        device = next(self._block.parameters()).device
        out = self._block(hidden.to(device), **self._kwargs(hidden.shape[0]))
        value: Tensor = out[0] if isinstance(out, tuple) else out
        return value


def _layer(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
