"""The table of `quantkit bench`: one column per load, one row per number, and the formula of each."""

from collections.abc import Callable
from functools import partial

from rich.table import Column, Table

from quantkit.bench.measures import Figures, Spread
from quantkit.bench.run import BenchReport


def bench_table(report: BenchReport) -> Table:
    """One column per load, one row per number, and the formula of each."""
    columns = [Column(point.load, no_wrap=True, justify="right") for point in report.points]
    table = Table(Column("", no_wrap=True), *columns, Column("what it is", overflow="fold"), title_justify="left")
    table.title = (
        f"{report.model}: {report.workload.prompt_tokens} prompt and {report.workload.max_tokens} new tokens per request"
    )
    limited = any(point.figures.goodput is not None for point in report.points)

    def row(name: str, cell: Callable[[Figures], str], meaning: str) -> None:
        table.add_row(name, *(cell(point.figures) for point in report.points), meaning)

    row("completed", lambda f: str(f.completed), "requests whose text is complete")
    row("failed", lambda f: str(f.requests - f.completed), "all other requests")
    row("system TPS", lambda f: f"{f.system_tps:.1f}", "output tokens of completed requests / wall time")
    row("RPS", lambda f: f"{f.rps:.2f}", "completed requests / wall time")
    if limited:
        row("goodput", lambda f: f"{f.goodput or 0:.2f}", "completed requests within both limits / wall time")
    for name, unit, of, factor, meaning in _SPREADS:
        for part in ("mean", "median", "p99"):
            first = f"{name} {part}, {unit}" if part == "mean" else f"{name} {part}"
            row(first, partial(_cell, of, part, factor), meaning if part == "mean" else "")
    return table


def _cell(of: Callable[[Figures], Spread | None], part: str, factor: float, found: Figures) -> str:
    """One number of a spread, in its unit."""
    spread = of(found)
    return "-" if spread is None else f"{factor * getattr(spread, part):.{1 if factor > 1 else 2}f}"


#: Name, unit, attribute of the figures, factor from seconds to the unit, formula.
_SPREADS: list[tuple[str, str, Callable[[Figures], Spread | None], float, str]] = [
    ("TTFT", "ms", lambda f: f.ttft, 1000, "first text - arrival (arrival: when the request was due to be sent)"),
    ("ITL", "ms", lambda f: f.itl, 1000, "gap between consecutive chunks of text"),
    ("TPOT", "ms", lambda f: f.tpot, 1000, "(E2E - TTFT) / (output tokens - 1)"),
    ("E2E", "ms", lambda f: f.e2e, 1000, "end of the text - arrival"),
    ("user TPS", "tokens/s", lambda f: f.user_tps, 1, "1 / TPOT (p99: 99% of requests are at least that fast)"),
]
