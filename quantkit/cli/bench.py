"""`quantkit bench`: latency and throughput of a server under load."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.table import Column, Table

from quantkit.cli import options, tables
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.bench.load import Load
    from quantkit.bench.measures import Figures, Spread
    from quantkit.bench.run import BenchReport

EXAMPLE = (
    "Example: quantkit bench demo-w4 --rate 1,2,4,8 --plot sweep.png -- --spec ngram   (or quantkit bench http://host:8000)"
)

_Number = TypeVar("_Number", int, float)


def bench(
    target: Annotated[str, typer.Argument(metavar="URL|MODEL", help="A server, or a model that is served meanwhile.")],
    serve: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="For MODEL: options of `quantkit serve`.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="N,...", help="Clients that each wait for their answer. Default: 8.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="R,...", help="Requests/s at random times (Poisson), whether answered or not.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each load.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a request.")] = 64,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos/--heed-eos", help="Whether all of them are generated.")] = True,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    ttft_limit: Annotated[float | None, typer.Option(min=0, metavar="MS", help="For goodput.")] = None,
    tpot_limit: Annotated[float | None, typer.Option(min=0, metavar="MS", help="For goodput.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="A longer request has failed.")] = 600.0,
    model_name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the server's models; default: the first.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="QUANTKIT_API_KEY", show_envvar=True, help="Of the server.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Throughput against latency.")] = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure an OpenAI-compatible server under load: TTFT, ITL, TPOT, throughput. Several loads, with commas, are a sweep.

    Prompts are random token ids, all different. Requests that fail are counted and named.
    """
    options.require_writable(json_file)
    if plot is not None and (plot.suffix != ".png" or not plot.absolute().parent.is_dir()):
        raise QuantkitError(f"--plot {plot}: cannot be written there; name a .png in a folder that exists")
    try:
        from quantkit.bench.child import serving
        from quantkit.bench.client import Workload
        from quantkit.bench.measures import Limits
        from quantkit.bench.plot import plot as draw
        from quantkit.bench.run import BenchRequest, run
    except ModuleNotFoundError as error:
        raise QuantkitError(f'quantkit bench needs {error.name}; pip install "quantkit[bench]"') from None
    loads = _loads(concurrency, rate, seed)
    remote = target.startswith(("http://", "https://"))
    if remote and serve:
        raise QuantkitError(f"{' '.join(serve)}: options of `quantkit serve`, and {target} is served already; leave them out")
    with nullcontext(target) if remote else serving(target, serve or (), api_key) as url:
        request = BenchRequest(
            url=url,
            model=model_name,
            api_key=api_key,
            loads=loads,
            requests=requests,
            workload=Workload(prompt_tokens, max_tokens, ignore_eos, seed, timeout),
            limits=Limits(_seconds(ttft_limit), _seconds(tpot_limit)),
        )
        with tables.stage_bar(enabled=not quiet and sys.stderr.isatty()) as advance:
            report = run(request, advance)
    console = options.console(json_file, quiet=quiet)
    console.print(_table(report))
    for point in report.points:
        for reason, count in point.figures.errors.items():
            console.print(f"{point.load}: {count} failed: {reason}", markup=False)
    if plot is not None:
        draw(report, plot)
    options.write_json(json_file, report.to_json())


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _loads(concurrency: str | None, rate: str | None, seed: int) -> "list[Load]":
    """What `--concurrency` or `--rate` asks for."""
    from quantkit.bench.load import ClosedLoop, Poisson

    if concurrency is not None and rate is not None:
        raise QuantkitError("--concurrency and --rate are two kinds of load; give one of them")
    if rate is not None:
        return [Poisson(each, seed) for each in _numbers(rate, "--rate", float)]
    return [ClosedLoop(each) for each in _numbers("8" if concurrency is None else concurrency, "--concurrency", int)]


def _numbers(text: str, option: str, kind: "type[_Number]") -> "list[_Number]":
    """Numbers above 0 with commas between them."""
    try:
        numbers = [kind(each) for each in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise QuantkitError(f"{option} {text}: write numbers above 0 with commas between them, for example 1,2,4")
    return numbers


def _table(report: "BenchReport") -> Table:
    """A column a load, a row a number, the formula beside it."""
    columns = [Column(point.load, no_wrap=True, justify="right") for point in report.points]
    table = Table(Column("", no_wrap=True), *columns, Column("what it is", overflow="fold"), title_justify="left")
    table.title = (
        f"{report.model}: {report.workload.prompt_tokens} prompt and {report.workload.max_tokens} new tokens a request"
    )
    limited = any(point.figures.goodput is not None for point in report.points)

    def row(name: str, cell: "Callable[[Figures], str]", meaning: str) -> None:
        table.add_row(name, *(cell(point.figures) for point in report.points), meaning)

    row("completed", lambda f: str(f.completed), "requests whose text came to its end")
    row("failed", lambda f: str(f.requests - f.completed), "the other requests")
    row("system TPS", lambda f: f"{f.system_tps:.1f}", "output tokens of completed requests / wall")
    row("RPS", lambda f: f"{f.rps:.2f}", "completed requests / wall")
    if limited:
        row("goodput", lambda f: f"{f.goodput or 0:.2f}", "completed requests within the limits / wall")
    for name, unit, of, factor, meaning in _SPREADS:
        for part in ("mean", "median", "p99"):
            first = f"{name} {part}, {unit}" if part == "mean" else f"{name} {part}"
            row(first, partial(_cell, of, part, factor), meaning if part == "mean" else "")
    return table


def _cell(of: "Callable[[Figures], Spread | None]", part: str, factor: float, found: "Figures") -> str:
    """One number of a spread, in its unit."""
    spread = of(found)
    return "-" if spread is None else f"{factor * getattr(spread, part):.{1 if factor > 1 else 2}f}"


#: Name, unit, what of the figures, the unit's factor, formula.
_SPREADS: "list[tuple[str, str, Callable[[Figures], Spread | None], float, str]]" = [
    ("TTFT", "ms", lambda f: f.ttft, 1000, "first text - arrival (arrival: when the request was due)"),
    ("ITL", "ms", lambda f: f.itl, 1000, "gap between consecutive chunks of text"),
    ("TPOT", "ms", lambda f: f.tpot, 1000, "(E2E - TTFT) / (output tokens - 1)"),
    ("E2E", "ms", lambda f: f.e2e, 1000, "end of the text - arrival"),
    ("user TPS", "tokens/s", lambda f: f.user_tps, 1, "1 / TPOT (p99: 99% of requests are at least that fast)"),
]
