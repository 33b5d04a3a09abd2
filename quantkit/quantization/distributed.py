"""The processes of one run, as `torchrun` starts them: how work is divided among them, and how they exchange results.

The result must not depend on the number of processes, but a sum of floating-point numbers depends on its order. So partial
sums of several processes are never added up. Rows are distributed for the forward passes, but each sum runs over all rows, in
order, in the one process that owns it: some columns of a Hessian, some matrices, some candidates of a search. The owner sends
the result to the others. The computations and their shapes are the same for any number of processes; only where they run
differs.

All processes of a group call its methods in the same order. The first process leads: only it writes files and prints.
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

#: How long a process waits for another one, which may be solving a large matrix. A process that died is noticed at once.
_TIMEOUT = timedelta(minutes=30)

#: How long a failing process waits for the first one to clean up and to report the error.
_ERROR_GRACE_PERIOD = timedelta(seconds=10)

#: The environment variables that a launcher sets for every process that it starts.
_LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


class ProcessGroup:
    """A group of one process. `init_distributed` returns a group with peers if there are any.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank, size = 0, 1

    def assign_owners(self, costs: Sequence[float]) -> list[int]:
        """The rank that does each job. The most expensive jobs are assigned first; every process gets the same answer."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
            owners[job] = loads.index(min(loads))
            loads[owners[job]] += costs[job]
        return owners

    def local_device(self, device: torch.device) -> torch.device:
        """The device of this process: if `device` is "cuda", each process gets a GPU of its own.

        Raises:
            RecipeError: there are fewer GPUs than processes, or `device` names one GPU for all of them.
        """
        return device

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite `tensor` with its value in process `owner`. Shape and dtype must be the same everywhere.

        Raises:
            PeerError: another process ended. `broadcast_object` and `map` raise it, too.
        """

    def broadcast_object(self, value: T, owner: int = 0) -> T:
        """The `value` of process `owner`, which must be picklable."""
        return value

    def map(self, function: Callable[[float], float], items: Sequence[float]) -> list[float]:
        """`function` of every item; each item is computed by one process."""
        return [function(item) for item in items]


#: The group of a process without peers.
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
            raise RecipeError(f"--device {device}: each of several processes takes its own GPU; write --device cuda")
        if local >= count:
            raise RecipeError(f"{local + 1} or more processes share {count} GPUs; start no more than one per GPU")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """As in `ProcessGroup`."""
        if not tensor.numel():
            return
        whole = tensor.contiguous()
        with self._peer_errors():
            # As bytes, because not every backend supports every dtype.
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
            dist.all_reduce(values)  # a value plus zeros: exact in any order
        found: list[float] = values.tolist()
        return found

    @contextmanager
    def _peer_errors(self) -> Iterator[None]:
        """Turn a connection failure into the error that ended the peer, if the peer reported one."""
        try:
            yield
        except RuntimeError as error:
            with suppress(RuntimeError):
                if self._store.check(["error"]):
                    kind, text = json.loads(self._store.get("error"))
                    raise getattr(errors, kind)(text) from None
            # torch says: "[file:line] what happened. What may have caused it."
            reason = re.sub(r"^\[\S+\] ", "", " ".join(str(error).split())).split(". ")[0]
            raise PeerError(
                f"another of the {self.size} processes ended or no longer answers ({reason:.150}); the same command continues "
                "after the last finished block"
            ) from None

    def leave(self, error: BaseException) -> None:
        """Leave the group because of `error`, and tell the others. Returns in the process that should report the error.

        Raises:
            SystemExit: another process reports it.
        """
        status = error.exit_code if isinstance(error, QuantkitError) else 1
        try:
            if isinstance(error, QuantkitError) and not isinstance(error, PeerError):
                self._store.set("error", json.dumps([type(error).__name__, str(error)]))
            dist.destroy_process_group()  # peers that wait for this process find the connection closed
            if self.rank and self._store.check(["error"]):
                with suppress(RuntimeError):
                    self._store.wait(["said"], _ERROR_GRACE_PERIOD)
            first = self._store.add("said", 1) == 1
        except RuntimeError:  # the process that kept the store has ended
            first = True
        if not first:
            raise SystemExit(status) from None


@contextmanager
def init_distributed() -> Iterator[ProcessGroup]:
    """The process group: all processes that a launcher such as torchrun started, or this process alone.

    An error in one process ends all of them, and one process reports it.

    Raises:
        PeerError: the processes cannot connect to one another.
        SystemExit: another process reports why the run ends.
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
        raise PeerError(f"the processes cannot find one another ({reason}); start them with torchrun") from None
    group = DistributedProcessGroup(rank, size, store)
    try:
        yield group
    except (Exception, KeyboardInterrupt) as error:
        group.leave(error)
        raise
    dist.destroy_process_group()
