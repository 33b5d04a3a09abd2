"""What a run measured: dataclasses that are written to JSON field by field."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MatrixReport:
    """One quantized matrix.

    Attributes:
        name: module path.
        scheme: as text, e.g. "4-bit g128 sym".
        method: what produced the codes; "rtn" with a note if GPTQ failed.
        output_error: ||X (W - V)^T||^2 / ||X W^T||^2 over the calibration inputs X, for the target weights W and
            the quantized ones V. For data-free rounding X is white, which makes it the relative weight error.
        snr_db: 10 log10(||W||^2 / ||W - V||^2), decibels.
        damping: the fraction of its mean diagonal that was added to the Hessian; None without a Hessian.
        scale_ratio: AWQ's exponent; None if no scale was searched.
        saturation: the fraction of codes at either end of the grid.
        seconds: wall time of the solve; matrices that are solved together share it in proportion to their rows.
        note: what the user should know about this matrix.
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
        matrices: number of quantized matrices.
        bits_per_weight: bits per weight of the quantized matrices, scales and zero points included.
        size_bytes, source_bytes: size of all shards, written and of the source.
        output_error: mean over the matrices.
        cpu_seconds, wall_seconds: time of the first process. After a resume, the interrupted part is not included.
        peak_memory_bytes: largest resident set of the first process.
        resumed_blocks: blocks that an interrupted run had finished.
        processes: number of processes that shared the work; the result does not depend on it.
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
    """The contents of `OUT/quantkit.json`. Passing the file to `--recipe` reproduces the tensors."""

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
