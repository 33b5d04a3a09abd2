"""The processes of one run, as `torchrun` starts them: who does what, and how the others come to know it.

The result must not depend on how many there are, and a sum of floats depends on its order. So no sum is ever put together
from what several processes summed: rows are shared out for the forward passes, but every sum runs over all rows, in their
order, in the one process that owns it (some columns of a Hessian, some matrices, some candidates of a search). The others
get what came out. What is computed, on which shapes, is the same for any number of processes; only where differs.

All processes of a team call its methods in the same order. The first one leads: it alone writes and speaks.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from quantkit import errors
from quantkit.errors import PeerError, QuantkitError, RecipeError

T = TypeVar("T")

#: How long a process waits for another, which may be solving a large matrix. One that died is noticed at once.
_TIMEOUT = timedelta(minutes=30)

#: How long a process that fails leaves the first one time to clean up, and to say why in its place.
_ERROR_GRACE_PERIOD = timedelta(seconds=10)

#: What a launcher sets for every process that it starts.
_LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


class ProcessGroup:
    """A process alone; `init_distributed` gives one with its peers.

    Attributes:
        rank: this process's number.
        size: how many there are.
    """

    rank, size = 0, 1

    def assign_owners(self, costs: Sequence[float]) -> list[int]:
        """The rank that does each job, the dearest ones shared out first; the same answer in every process."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
            owners[job] = loads.index(min(loads))
            loads[owners[job]] += costs[job]
        return owners

    def local_device(self, device: torch.device) -> torch.device:
        """`device` for this process: of several GPUs, each takes its own.

        Raises:
            RecipeError: there are not enough, or one was named for all.
        """
        return device

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Fill `tensor` in place with what it holds in process `owner`; shape and dtype are the same everywhere.

        Raises:
            PeerError: a process is gone. So do `broadcast_object` and `map`.
        """

    def broadcast_object(self, value: T, owner: int = 0) -> T:
        """`value` as it is in process `owner`; it must be possible to pickle it."""
        return value

    def map(self, function: Callable[[float], float], items: Sequence[float]) -> list[float]:
        """`function` of every item, each computed by one process."""
        return [function(item) for item in items]


#: The team of whoever has no peers.
SINGLE_PROCESS = ProcessGroup()


class DistributedProcessGroup(ProcessGroup):
    """Several processes, connected by a torch process group."""

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self.rank, self.size, self._store = rank, size, store

    def local_device(self, device: torch.device) -> torch.device:
        """As in `ProcessGroup`."""
        if device.type != "cuda":
            return device
        local, count = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if str(device) != "cuda":
            raise RecipeError(f"--device {device}: of several processes each takes a GPU of its own; write --device cuda")
        if local >= count:
            raise RecipeError(f"{local + 1} or more processes share {count} GPUs; start no more than one a GPU")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """As in `ProcessGroup`."""
        if not tensor.numel():
            return
        whole = tensor.contiguous()
        with self._peer_errors():
            # As bytes: not every backend knows every dtype.
            dist.broadcast(whole.view(-1).view(torch.uint8), owner)
        if whole is not tensor and owner != self.rank:
            tensor.copy_(whole)

    def broadcast_object(self, value: T, owner: int = 0) -> T:
        """As in `ProcessGroup`."""
        box = [value if owner == self.rank else None]
        with self._peer_errors():
            dist.broadcast_object_list(box, owner, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def map(self, function: Callable[[float], float], items: Sequence[float]) -> list[float]:
        """As in `ProcessGroup`."""
        mine = range(self.rank, len(items), self.size)
        values = torch.zeros(len(items), dtype=torch.float64)
        for job in mine:
            values[job] = function(items[job])
        with self._peer_errors():
            dist.all_reduce(values)  # one value and zeros: exact in any order
        found: list[float] = values.tolist()
        return found

    @contextmanager
    def _peer_errors(self) -> Iterator[None]:
        """Turn the failure of a connection into what made the peer end, if it said so."""
        try:
            yield
        except RuntimeError as error:
            with suppress(RuntimeError):
                if self._store.check(["error"]):
                    kind, text = json.loads(self._store.get("error"))
                    raise getattr(errors, kind)(text) from None
            # "[file:line] what happened. What may have caused it."
            reason = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split())).split(". ")[0]
            raise PeerError(
                f"another of the {self.size} processes ended or no longer answers ({reason:.150}); the same command goes on "
                "after the last finished block"
            ) from None

    def end(self, error: BaseException) -> None:
        """Leave because of `error`, letting the others know. Comes back in the process that is to explain it.

        Raises:
            SystemExit: another process explains, or has.
        """
        status = error.exit_code if isinstance(error, QuantkitError) else 1
        try:
            if isinstance(error, QuantkitError) and not isinstance(error, PeerError):
                self._store.set("error", json.dumps([type(error).__name__, str(error)]))
            dist.destroy_process_group()  # whoever waits for this process finds the connection closed
            if self.rank and self._store.check(["error"]):
                with suppress(RuntimeError):
                    self._store.wait(["said"], _ERROR_GRACE_PERIOD)
            first = self._store.add("said", 1) == 1
        except RuntimeError:  # the store went with the process that kept it
            first = True
        if not first:
            raise SystemExit(status) from None


@contextmanager
def init_distributed() -> Iterator[ProcessGroup]:
    """The team of this process: its peers if a launcher such as torchrun started several, else itself alone.

    Whatever goes wrong in any process ends all of them, and one says why.

    Raises:
        PeerError: the others did not come.
        SystemExit: another process says why the run ends.
    """
    if not os.environ.keys() >= _LAUNCHER_VARIABLES or os.environ["WORLD_SIZE"] == "1":
        yield SINGLE_PROCESS
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PeerError(f"the processes do not find one another ({reason}); start them with torchrun") from None
    process_group = DistributedProcessGroup(rank, size, store)
    try:
        yield process_group
    except (Exception, KeyboardInterrupt) as error:
        process_group.end(error)
        raise
    dist.destroy_process_group()
