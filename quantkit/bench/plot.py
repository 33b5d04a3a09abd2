"""Plot latency against throughput over a sweep of loads."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantkit.bench.measures import Figures, Spread
from quantkit.bench.run import BenchReport, Point
from quantkit.errors import ResourceError


def plot(report: BenchReport, path: Path) -> None:
    """Write the plot as a PNG. No display is needed.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        draw(report).savefig(path, format="png", dpi=144)
    except OSError as error:
        raise ResourceError(f"--plot {path}: cannot be written ({error.strerror})") from None


def draw(report: BenchReport) -> Figure:
    """TTFT and TPOT over system TPS in two panels, with one point per load."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    w = report.workload
    unit = report.points[0].load.split(" ", 1)[1]
    figure.suptitle(f"{report.model}: {w.prompt_tokens} prompt and up to {w.max_tokens} new tokens; at the points: {unit}")
    left, right = figure.subplots(1, 2)
    _panel(left, "TTFT", report.points, lambda f: f.ttft, report.limits.ttft)
    _panel(right, "TPOT", report.points, lambda f: f.tpot, report.limits.tpot)
    return figure


def _panel(
    axes: Axes, name: str, points: Sequence[Point], latency: Callable[[Figures], Spread | None], limit: float | None
) -> None:
    """Median and 99th percentile of one latency. Loads without a completed request are left out."""
    found = [(point, spread) for point in points if (spread := latency(point.figures)) is not None]
    throughput = [point.figures.system_tps for point, _ in found]
    axes.plot(throughput, [1000 * spread.median for _, spread in found], marker="o", label="median")
    axes.plot(throughput, [1000 * spread.p99 for _, spread in found], marker="o", linestyle="--", label="p99")
    for (point, spread), x in zip(found, throughput, strict=True):
        place = x, 1000 * spread.median
        axes.annotate(f"{point.level:g}", place, textcoords="offset points", xytext=(0, -14), ha="center", fontsize="small")
    if limit is not None:
        axes.axhline(1000 * limit, color="grey", linewidth=0.8, label="limit")
    axes.set_xlabel("system TPS, output tokens/s")
    axes.set_ylabel(f"{name}, ms")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
