"""Quantize the matrices of one block, group by group, in the order in which the block runs them."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
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

#: Matrices are solved stacked on one another up to this many rows. On a CPU the loop over the columns costs as much as 560
#: rows: what more than this would gain is less than sharing them out does. On a GPU the loop is nearly all that it takes.
_MAX_STACKED_ROWS = {"cpu": 4096, "cuda": 65536}


@dataclass
class BlockQuantizer:
    """One block at work.

    Attributes:
        block: the decoder block, real.
        prefix: start of its tensor names.
        schemes: module name inside the block -> scheme, for the matrices to quantize.
        config: the model's transformers config.
        settings: how to solve.
        announce: called with each matrix's report.
        written: what the block will be written as, filled group by group; the same in every process.
        team: who shares the work.
    """

    block: nn.Module
    prefix: str
    schemes: Mapping[str, Scheme]
    config: PreTrainedConfig
    settings: SolverSettings
    on_report: Callable[[MatrixReport], None]
    written: QuantizedBlock = field(default_factory=lambda: QuantizedBlock({}, {}))
    process_group: ProcessGroup = SINGLE_PROCESS

    def weight(self, name: str) -> Tensor:
        """A matrix of the block, float32 [N, K]; not to be modified."""
        return self._parameter(name).detach().float()

    def _parameter(self, name: str) -> Tensor:
        weight = self.block.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def groups_to_quantize(self, groups: tuple[MatrixGroup, ...]) -> tuple[MatrixGroup, ...]:
        """The groups of which at least one matrix is quantized."""
        return tuple(group for group in groups if any(name in self.schemes for name in group.names))

    def run(self, groups: tuple[MatrixGroup, ...], lockstep: LockstepForward | None, streams: list[ActivationStream]) -> None:
        """Quantize `groups` (active ones); with a walk, from measured inputs, each group seeing the ones before quantized."""
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
            # The first stream goes on with what was written; a second one stays with the (scaled) originals.
            quantized = self.written.quantized
            streams[0].weights |= {
                name: quantized[name].dequantize(self._parameter(name).dtype) for name in weights if name in quantized
            }
            # Forward and solver take tensors of other sizes than one another.
            trim_memory()

    def _measure(self, lockstep: LockstepForward, number: int, columns: int) -> InputStats:
        """The moments of group `number`'s inputs.

        Raises:
            NumericsError: an activation is NaN or Inf.
        """
        sums = accumulate_hessian(lockstep.inputs(number), columns, next(self.block.parameters()).device, self.process_group)
        hessian, drift = sums.mean(), sums.drift()
        # A NaN or Inf in either stream reaches these sums.
        strayed = 0.0 if drift is None else float(drift.cross.sum())
        if not math.isfinite(float(hessian.diagonal().sum()) + strayed):
            raise NumericsError(
                f"{self.prefix}{lockstep.groups[number].names[0]}: its calibration inputs hold NaN or Inf; the model "
                "overflows in its own dtype, or the checkpoint is damaged"
            )
        return InputStats(hessian, drift, self.settings)

    def _scale(
        self, lockstep: LockstepForward, number: int, weights: dict[str, Tensor], stats: InputStats
    ) -> tuple[InputStats, float | None, str]:
        """Search and fold AWQ's channel scale: multiplies `weights` in place, returns moments of the divided input."""
        fold = lockstep.groups[number].fold
        if fold is None:
            return stats, None, "AWQ scale not folded: nothing before it can absorb one"
        hessian, cost = stats.hessian, None if stats.factor is None else stats.factor.cost
        channel_groups = find_channel_groups(fold, hessian.shape[0], self.config).to(hessian.device)
        parts = [(weight, self.schemes[name]) for name, weight in weights.items() if name in self.schemes]
        found = search_channel_scale(parts, hessian, self.settings.dtype, channel_groups, cost, self.process_group.map)
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
        """Solve a group's matrices, shared out in the team, and report each."""
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
        """Matrices of one scheme, solved stacked on one another in `target`, and the report of each."""
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
    """Which matrices (name -> rows) are solved stacked: those of one scheme, up to `limit` rows or one that has more.

    It decides the last bits, so it does not depend on how many processes share them out.
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
    inputs: Iterable[tuple[Tensor, ...]], columns: int, device: torch.device, process_group: ProcessGroup
) -> HessianAccumulator:
    """The sums over all inputs: every process of the team sums its share of the columns, and all get all of them."""
    owners = process_group.assign_owners(PARTS)
    sums = HessianAccumulator(columns, device, [part for part, owner in enumerate(owners) if owner == process_group.rank])
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
    """Measure one quantized matrix against the float32 target [N, K] that it was to match."""
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
