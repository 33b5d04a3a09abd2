"""Walk the calibration rows through the model, stopping before every group of matrices.

GPTQ wants each group's inputs to come from the already quantized groups before it ("true-sequential"), which a plain loop
pays for with one partial forward a group. Here every micro-batch runs the block's own forward in a greenlet that pauses at
the group's first matrix; when all have arrived the group is quantized, and all go on with the new weights. So one block
costs one forward, whatever its structure. Where the paused tensors would not fit, each stop runs the block again from its
start (`keep_paused=False`): slower, but only one micro-batch is alive at a time.

Two streams walk side by side: what the quantized model sees, and (where the method asks for it) what the original model
sees at the same places. The second one walks for a share of the rows only: it costs as much time and memory as the first.

With several processes each walks its own micro-batches, dealt out in turn, and hands what a group reads to the others.
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

#: Tokens that run through a block at once. Fixed, because the order of sums decides the last bits of the result.
MICRO_BATCH_TOKENS = 1024


@dataclass
class ActivationStream:
    """One version of the model walking through a block.

    Attributes:
        hidden: per micro-batch, the block's input [B, T, D]; never modified.
        weights: module name -> weight in this version; read again at every step, so replacing one takes effect at once.
    """

    hidden: Sequence[Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


class LockstepForward:
    """One block's walk. For each group in order: read `inputs`, change the streams' weights; at the end read `outputs`.

    Attributes:
        groups: where it stops, in run order.
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
            block: a decoder block on its device; its forward takes hidden states and keyword arguments.
            groups: where to stop, in run order.
            streams: the versions that walk; the first has all micro-batches, a second one the first few of them.
            kwargs: keyword arguments of the block for a batch of that many rows.
            hold: pause between stops; otherwise run again from the start for each. The results are the same to the bit.
            team: who shares the micro-batches out; all of its processes read all inputs.
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
            # Before anyone waits for another's: a round's micro-batches run at the same time.
            mine = tuple(self._advance(stream, own, number) for stream in self._streams_with(own))
            for owner, index in enumerate(range(first, min(first + process_group.size, count))):
                values = mine if index == own else self._receive_buffers(index, number)
                for value in values:
                    process_group.broadcast(value, owner)
                yield values
            del mine, values  # no round outlives the next one's start

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches."""
        return len(self._streams[0].hidden)

    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """Per micro-batch, the block's output [B, T, D] in every stream that has it, after the last group."""
        return self.inputs(len(self.groups))

    def divide_input(self, number: int, scale: Tensor) -> None:
        """From now on divide what group `number` reads by `scale` [K], in every stream."""
        self._divisors[number] = scale

    def _streams_with(self, index: int) -> list[int]:
        """The streams that have micro-batch `index`."""
        return [k for k, stream in enumerate(self._streams) if index < len(stream.hidden)]

    def _receive_buffers(self, index: int, number: int) -> tuple[Tensor, ...]:
        """Room for what group `number` reads in a micro-batch that another process walks."""
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
        """Run one micro-batch until it stands before group `number`, or to its end."""
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
        """Move what group `number` reads to the micro-batch's own place in one large tensor.

        Left where it is, it would lie among the forward's short-lived tensors, and those of the next micro-batches fit into
        no hole that it leaves. What can be divided for a group is read by nobody else, so the place is free again as soon as
        the group has run, although the block's frames may still refer to it.
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
