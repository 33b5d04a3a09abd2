"""Quantize the matrices of one block, group by group, in the order in which the block runs them."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from quantkit.errors import NumericsError
from quantkit.methods.awq import search_channel_scale
from quantkit.methods.base import InputStats, SolverSettings
from quantkit.methods.grid import QuantizedWeight
from quantkit.methods.hessian import PARTS, HessianAccumulator
from quantkit.methods.scheme import Scheme
from quantkit.methods.solve import solve
from quantkit.models.families import MatrixGroup
from quantkit.quantization.calibration import ActivationStream, LockstepForward
from quantkit.quantization.distributed import SINGLE_PROCESS, ProcessGroup
from quantkit.quantization.fold_scales import QuantizedBlock, effective_scale, find_channel_groups, fold_scale
from quantkit.quantization.report import MatrixReport
from quantkit.utils.resources import trim_memory

#: Matrices are stacked and solved together up to this many rows. On a CPU the overhead of the loop over columns equals the
#: cost of 560 rows: taller stacks would save less than distributing them over processes does. On a GPU nearly all of the time
#: is that overhead.
_MAX_STACKED_ROWS = {"cpu": 4096, "cuda": 65536}


@dataclass
class BlockQuantizer:
    """Quantizes the matrices of one block.

    Attributes:
        block: the decoder block, its weights loaded.
        prefix: the start of its tensor names.
        schemes: the scheme of each matrix to quantize, by module name inside the block.
        config: the model's transformers config.
        settings: how matrices are solved.
        on_report: called with the report of each matrix.
        on_stage: called with (name of the stage, micro-batches or matrices done, how many there are).
        written: what the block will be written as. Filled group by group, with the same values in every process.
        process_group: the processes that share the work.
        hessian_dtype: the dtype in which Hessians are multiplied (`fastest_products`).
    """

    block: nn.Module
    prefix: str
    schemes: Mapping[str, Scheme]
    config: PreTrainedConfig
    settings: SolverSettings
    on_report: Callable[[MatrixReport], None]
    on_stage: Callable[[str, int, int], None] = lambda _name, _done, _total: None
    written: QuantizedBlock = field(default_factory=lambda: QuantizedBlock({}, {}))
    process_group: ProcessGroup = SINGLE_PROCESS
    hessian_dtype: torch.dtype = torch.float32

    def weight(self, name: str) -> Tensor:
        """A matrix of the block, float32 [N, K]. Callers must not modify it."""
        return self._parameter(name).detach().float()

    def _parameter(self, name: str) -> Tensor:
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def groups_to_quantize(self, groups: tuple[MatrixGroup, ...]) -> tuple[MatrixGroup, ...]:
        """The groups with at least one matrix to quantize."""
        return tuple(group for group in groups if any(name in self.schemes for name in group.names))

    def quantize(
        self, groups: tuple[MatrixGroup, ...], lockstep: LockstepForward | None, streams: list[ActivationStream]
    ) -> None:
        """Quantize `groups`, which come from `groups_to_quantize`.

        Args:
            groups: in run order.
            lockstep: the forward pass that stops before each group. Each group is solved for the inputs that it gets once
                the groups before it are quantized. None: data-free rounding.
            streams: the streams of `lockstep`; their weights are replaced on the way.
        """
        for stream in streams:
            stream.weights |= {name: self._parameter(name).detach() for group in groups for name in group.names}
        for number, group in enumerate(groups):
            started = time.monotonic()
            weights = {name: self.weight(name) for name in group.names}
            if lockstep is None:
                self._solve(group, weights, None, None, "", started)
                continue
            stats, ratio, note = self._measure(lockstep, number, next(iter(weights.values())).shape[1]), None, ""
            trim_memory()
            if self.settings.method.scales_channels:
                stats, ratio, note = self._scale(lockstep, number, weights, stats)
                for stream in streams:
                    stream.weights |= {name: weight.to(self._parameter(name).dtype) for name, weight in weights.items()}
            self._solve(group, weights, stats, ratio, note, started)
            # The first stream continues with the quantized weights, a second one with the (scaled) originals.
            quantized = self.written.quantized
            streams[0].weights |= {
                name: quantized[name].dequantize(self._parameter(name).dtype) for name in weights if name in quantized
            }
            # Forward pass and solver allocate tensors of different sizes, so freed memory of one does not fit the other.
            trim_memory()

    def _measure(self, lockstep: LockstepForward, number: int, columns: int) -> InputStats:
        """Statistics of the inputs of group `number`.

        Raises:
            NumericsError: an activation is NaN or Inf.
        """
        inputs = self._counted(lockstep.inputs(number), lockstep.groups[number], lockstep.micro_batches)
        device = next(self.block.parameters()).device
        sums = accumulate_hessian(inputs, columns, device, self.process_group, self.hessian_dtype)
        hessian, drift = sums.mean(), sums.drift()
        # A NaN or Inf in either stream makes one of these sums NaN or Inf.
        cross_sum = 0.0 if drift is None else float(drift.cross.sum())
        if not math.isfinite(float(hessian.diagonal().sum()) + cross_sum):
            raise NumericsError(
                f"{self.prefix}{lockstep.groups[number].names[0]}: its calibration inputs hold NaN or Inf; the model "
                "overflows in its own dtype, or the checkpoint is damaged"
            )
        return InputStats(hessian, drift, self.settings)

    def _counted(self, inputs: Iterator[tuple[Tensor, ...]], group: MatrixGroup, total: int) -> Iterator[tuple[Tensor, ...]]:
        """`inputs`, each of which is reported as progress once it has been used."""
        for done, values in enumerate(inputs, start=1):
            yield values
            self.on_stage(f"{self.prefix}{group.names[0]} calibration", done, total)

    def _scale(
        self, lockstep: LockstepForward, number: int, weights: dict[str, Tensor], stats: InputStats
    ) -> tuple[InputStats, float | None, str]:
        """Search AWQ's channel scale and fold it into the group's producer.

        Returns:
            The statistics of the divided input, the exponent of the scale, and a note for the reports. `weights` are replaced
            by the multiplied ones.
        """
        fold = lockstep.groups[number].fold
        if fold is None:
            return stats, None, "AWQ scale not folded: nothing before it can absorb one"
        hessian, cost = stats.hessian, None if stats.factor is None else stats.factor.cost
        channel_groups = find_channel_groups(fold, hessian.shape[0], self.config).to(hessian.device)
        parts = [(weight, self.schemes[name]) for name, weight in weights.items() if name in self.schemes]
        found = search_channel_scale(
            *(parts, hessian, self.settings.dtype, channel_groups, cost),
            parallel_map=self.process_group.map,
            product_dtype=self.hessian_dtype,
        )
        scale = effective_scale(fold, self.block, found.scale, self.settings.dtype)
        fold_scale(fold, self.block, scale, channel_groups, self.written, self.settings.dtype)
        for name, weight in weights.items():
            weights[name] = weight * scale
            if name not in self.schemes:
                self.written.unquantized[f"{name}.weight"] = weights[name].to(self.settings.dtype)
        lockstep.divide_input(number, scale)
        return stats.divided_by(scale), found.ratio, ""

    def _solve(
        self,
        group: MatrixGroup,
        weights: dict[str, Tensor],
        stats: InputStats | None,
        ratio: float | None,
        note: str,
        started: float,
    ) -> None:
        """Solve the matrices of a group, distributed over the processes, and report each."""
        names = [name for name in group.names if name in self.schemes]
        rows = {name: weights[name].shape[0] for name in names}
        before, device = time.monotonic() - started, weights[names[0]].device
        batches = stack_matrices(self.schemes, rows, _MAX_STACKED_ROWS[device.type])
        owners = self.process_group.assign_owners([sum(rows[name] for name in batch) for batch in batches])
        owner_of = {name: owner for batch, owner in zip(batches, owners, strict=True) for name in batch}
        solved: dict[str, tuple[QuantizedWeight, MatrixReport | None]] = {
            name: (QuantizedWeight.empty(weights[name].shape, self.schemes[name], device), None) for name in names
        }
        own = [batch for batch, owner in zip(batches, owners, strict=True) if owner == self.process_group.rank]
        stacked = (torch.cat([weights[name] for name in batch]) for batch in own)
        targets = stacked if stats is None else stats.take_targets(stacked)
        for batch, target in zip(own, targets, strict=True):
            parts = dict(zip(batch, target.split([rows[name] for name in batch]), strict=True))
            solved |= self._solve_stacked(target, parts, stats, ratio, note)
        for name in names:
            quantized, report = solved[name]
            for tensor in (quantized.codes, quantized.scales, quantized.zeros):
                self.process_group.broadcast(tensor, owner_of[name])
            report = self.process_group.broadcast_object(report, owner_of[name])
            assert report is not None
            self.written.quantized[name] = quantized
            self.on_report(replace(report, seconds=report.seconds + before * rows[name] / sum(rows.values())))

    def _solve_stacked(
        self, target: Tensor, parts: Mapping[str, Tensor], stats: InputStats | None, ratio: float | None, note: str
    ) -> dict[str, tuple[QuantizedWeight, MatrixReport]]:
        """Solve matrices of one scheme, which are stacked in `target`. Returns each one's quantized weight and report."""
        started = time.monotonic()
        stacked = solve(target, stats, self.schemes[next(iter(parts))], self.settings)
        seconds = time.monotonic() - started
        solved, start = {}, 0
        for name, part in parts.items():
            quantized, share = stacked.rows(start, start + len(part)), seconds * len(part) / len(target)
            report = matrix_report(self.prefix + name, quantized, part, stats, self.settings, ratio, note, share)
            solved[name] = quantized, report
            start += len(part)
        return solved


def stack_matrices(schemes: Mapping[str, Scheme], rows: Mapping[str, int], limit: int) -> list[list[str]]:
    """The matrices to be solved together: of one scheme and up to `limit` rows, or a single larger one.

    Stacking decides the last bits of the result, so it must not depend on the number of processes.

    Args:
        schemes: scheme per matrix.
        rows: number of rows per matrix.
        limit: most rows per stack.
    """
    found: list[list[str]] = []
    for scheme in dict.fromkeys(schemes[name] for name in rows):
        room = 0
        for name in (name for name in rows if schemes[name] == scheme):
            if rows[name] > room:
                found.append([])
                room = limit
            found[-1].append(name)
            room -= rows[name]
    return found


def accumulate_hessian(
    inputs: Iterable[tuple[Tensor, ...]],
    columns: int,
    device: torch.device,
    process_group: ProcessGroup,
    dtype: torch.dtype,
) -> HessianAccumulator:
    """The sums over all inputs, multiplied in `dtype`.

    Every process sums its share of the columns; then each receives the others' sums.
    """
    owners = process_group.assign_owners(PARTS)
    own = [part for part, owner in enumerate(owners) if owner == process_group.rank]
    sums = HessianAccumulator(columns, device, own, dtype)
    for values in inputs:
        sums.add(*values)
    for part, owner in enumerate(owners):
        for tensor in sums.part(part):
            process_group.broadcast(tensor, owner)
    return sums


def matrix_report(
    name: str,
    quantized: QuantizedWeight,
    target: Tensor,
    stats: InputStats | None,
    settings: SolverSettings,
    ratio: float | None,
    note: str,
    seconds: float,
) -> MatrixReport:
    """Compare a quantized matrix with the float32 target [N, K] that it should match."""
    change = target - quantized.dequantize()
    noise, signal = float(change.square().sum()), float(target.square().sum())
    lost, total = noise, signal
    if stats is not None:
        lost = float((change @ stats.hessian).mul_(change).sum())
        total = float((target @ stats.hessian).mul_(target).sum())
    failed = stats is not None and settings.method.compensates_errors and stats.factor is None
    if failed:
        note = "the Hessian could not be factored even fully damped: fell back to rtn"
    at_ends = (quantized.codes == 0) | (quantized.codes == quantized.scheme.levels)
    return MatrixReport(
        name=name,
        scheme=str(quantized.scheme),
        method="rtn" if failed else settings.method.name,
        output_error=max(lost, 0.0) / max(total, 1e-30),
        snr_db=10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)),
        damping=stats.factor.damping if stats is not None and stats.factor is not None else None,
        scale_ratio=ratio,
        saturation=float(at_ends.float().mean()),
        seconds=seconds,
        note=note,
    )
