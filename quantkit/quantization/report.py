"""What a run measured, as data that goes to JSON unchanged."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MatrixReport:
    """One quantized matrix.

    Attributes:
        name: module path.
        scheme: as text, e.g. "4-bit g128 sym".
        method: what produced the codes; "rtn" with a note where GPTQ had to give up.
        output_error: ||X (W - V)^T||^2 / ||X W^T||^2 over the calibration inputs X, W the weights that were to be
            matched; for data-free rounding X is white, which makes it the relative weight error.
        snr_db: 10 log10(||W||^2 / ||W - V||^2), decibels.
        damping: fraction of the Hessian's mean diagonal that was added; None without a Hessian.
        scale_ratio: AWQ's exponent; None where no scale was searched.
        saturation: share of codes at either end of the grid.
        seconds: wall time of the solve (shared by matrices solved together, by rows).
        note: anything the user should know.
    """

    name: str
    scheme: str
    method: str
    output_error: float
    snr_db: float
    damping: float | None
    scale_ratio: float | None
    saturation: float
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Totals:
    """A run in numbers.

    Attributes:
        matrices: how many were quantized.
        bits_per_weight: of the quantized matrices, scales and zero points included.
        size_bytes, source_bytes: of all shards written, and of the source's.
        output_error: mean over matrices.
        cpu_seconds, wall_seconds: of the first process, which after a resume is not the whole run.
        peak_memory_bytes: largest resident set of the first process.
        resumed_blocks: blocks that an earlier, interrupted run had finished.
        processes: how many shared the work; it does not change the result.
    """

    matrices: int
    bits_per_weight: float
    size_bytes: int
    source_bytes: int
    output_error: float
    cpu_seconds: float
    wall_seconds: float
    peak_memory_bytes: int
    resumed_blocks: int
    processes: int = 1


@dataclass(frozen=True)
class RunReport:
    """Everything `OUT/quantkit.json` says. `recipe` alone, given back with `--recipe`, reproduces the tensors."""

    recipe: dict[str, Any]
    versions: dict[str, str]
    source: dict[str, Any]
    calibration_tokens_sha256: str | None
    output_sha256: dict[str, str]
    unquantized: dict[str, str]
    engines: list[dict[str, Any]]
    totals: Totals
    worst: list[str]
    matrices: list[MatrixReport]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)


def worst_five(matrices: list[MatrixReport]) -> list[str]:
    """Names of the five matrices with the largest output error, worst first."""
    return [m.name for m in sorted(matrices, key=lambda m: -m.output_error)[:5]]
