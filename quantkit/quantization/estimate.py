"""`quantize --plan`: estimate the memory, disk space and time of a run without changing anything on disk.

Memory and disk space follow from the shapes. For the time, one block is quantized with a few of the calibration rows, and the
part of its time that grows with the rows is scaled.
"""

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.writer import Workspace
from quantkit.formats import FORMATS, EngineSupport
from quantkit.methods.products import fastest_products
from quantkit.methods.scheme import Scheme
from quantkit.models.matmul_dtype import fastest_matmul
from quantkit.quantization.block_step import quantize_block
from quantkit.quantization.distributed import SINGLE_PROCESS
from quantkit.quantization.memory import plan_memory
from quantkit.quantization.prepare import QuantizationJob, prepare_job
from quantkit.quantization.progress import NoProgress
from quantkit.quantization.run import QuantizeRequest
from quantkit.utils.resources import peak_memory

#: Numbers of micro-batches with which one block is timed. The difference gives the time per micro-batch.
_TIMED = (1, 2)


@dataclass(frozen=True)
class RunEstimate:
    """An estimate of what a run needs.

    Attributes:
        host_bytes, device_bytes: peak memory of the host and of the GPU.
        disk_bytes: size of the artifact.
        working_bytes: the most disk space that the run needs at any time, next to OUT.
        free_bytes: free space on that disk now.
        seconds: wall time of the run.
        block_seconds: wall time of one block, with all rows.
        schemes: the scheme of each quantized matrix, by module path.
        unquantized: why each other matrix is not quantized, by module path.
        engines: the engines, and whether each loads the artifact.
    """

    host_bytes: int
    device_bytes: int
    disk_bytes: int
    working_bytes: int
    free_bytes: int
    seconds: float
    block_seconds: float
    schemes: dict[str, str]
    unquantized: dict[str, str]
    engines: list[EngineSupport]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)


def estimate_run(request: QuantizeRequest) -> RunEstimate:
    """Estimate what a run needs.

    Raises:
        QuantkitError: the run would be refused.
    """
    Workspace.require_free(request.out, request.folder, overwrite=request.overwrite)
    job = prepare_job(request.folder, request.recipe, request.device)
    job.model.matmul_dtype = fastest_matmul(job.model.dtype, request.device)
    if job.tokens is not None:
        job.hessian_dtype = fastest_products(job.model.dtype, request.device)
    block_seconds = _time_block(job)
    memory = plan_memory(job, request.max_memory, SINGLE_PROCESS)
    states, paused = job.activation_bytes() if job.tokens is not None else (0, 0)

    outside = sum(map(job.stored_bytes, job.non_block_tensors))
    block = sum(job.checkpoint.tensors[name].nbytes for name in job.checkpoint.names_under(job.model.prefix(0)))
    # The block as it was read and, in the dtype in which it is multiplied, before and after quantization.
    widened = job.model.matmul_dtype.itemsize / job.model.dtype.itemsize
    working = int((1 + 2 * widened) * block) + _solver_bytes(job)
    artifact = outside + sum(_stored_bytes(job, index) for index in range(job.model.block_count)) + _head_bytes(job)
    on_device = working + (paused if memory.keep_paused else 0) + outside
    cuda = request.device.type == "cuda"
    return RunEstimate(
        host_bytes=peak_memory() + (2 * block if cuda else on_device) + (states if memory.in_memory else 0),
        device_bytes=on_device if cuda else 0,
        disk_bytes=artifact,
        working_bytes=artifact + max(artifact + states, 2 * states),  # the shards, and either the merged ones or activations
        free_bytes=shutil.disk_usage(_existing(request.out)).free,
        seconds=block_seconds * job.model.block_count,
        block_seconds=block_seconds,
        schemes={name: str(scheme) for name, scheme in job.schemes.items() if scheme is not None},
        unquantized=job.unquantized(),
        engines=job.engines(),
    )


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.is_dir() else _existing(path.parent)


def _solver_bytes(job: QuantizationJob) -> int:
    """Working memory for the largest group: about eight float32 copies of its weights and six of its Hessian."""
    if job.tokens is None:
        return 0
    shapes = [[job.model.shape(0, name) for name in group.names] for group in job.model.family.groups]
    return max(32 * sum(n * k for n, k in group) + 24 * group[0][1] ** 2 for group in shapes)


def _stored_bytes(job: QuantizationJob, index: int) -> int:
    """Bytes of block `index` in the artifact, without headers."""
    prefix = job.model.prefix(index)
    total = sum(job.checkpoint.tensors[name].nbytes for name in job.checkpoint.names_under(prefix))
    for name, scheme in job.block_schemes(index).items():
        rows, columns = job.model.shape(index, name)
        total += _packed_bytes(rows, columns, scheme, job) - job.checkpoint.tensors[f"{prefix}{name}.weight"].nbytes
    return total


def _head_bytes(job: QuantizationJob) -> int:
    """Bytes of the output head in the artifact if a rule quantizes it, else 0."""
    scheme = job.schemes["lm_head"]
    if scheme is None:
        return 0
    rows, columns = job.model.head_weight.shape
    return _packed_bytes(rows, columns, scheme, job)


def _packed_bytes(rows: int, columns: int, scheme: Scheme, job: QuantizationJob) -> int:
    """Bytes of one quantized matrix in the artifact."""
    return FORMATS[job.recipe.format].stored_bytes(scheme, rows, columns, job.model.dtype.itemsize)


def _time_block(job: QuantizationJob) -> float:
    """Seconds per block with all rows, extrapolated linearly from measurements with few rows."""
    if job.tokens is None:
        return _seconds(job, None)
    batches = -(-len(job.tokens) // job.rows_per_batch)
    few = [_seconds(job, job.tokens[: count * job.rows_per_batch]) for count in _TIMED if count <= batches]
    if len(few) < len(_TIMED):
        return few[0]
    per_batch = max(few[1] - few[0], 0.0)
    return few[0] + per_batch * (batches - 1)


@torch.no_grad()
def _seconds(job: QuantizationJob, rows: Tensor | None) -> float:
    """Wall time of quantizing the first block that has a matrix to quantize, from `rows` calibration rows."""
    timed = replace(job, tokens=rows)
    index = next((index for index in range(job.model.block_count) if job.block_schemes(index)), 0)
    streams: list[list[Tensor]] = []
    if rows is not None:
        hidden = [timed.model.embed(batch)[0] for batch in timed.token_batches()]
        streams = [hidden[: -(-count // timed.rows_per_batch)] for count in timed.stream_rows]
    started = time.monotonic()
    quantize_block(timed, index, streams, NoProgress(), lambda _number, _outputs: None)
    return time.monotonic() - started
