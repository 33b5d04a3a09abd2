"""Progress of a quantization: a rich bar on a terminal, one plain line a block elsewhere, nothing with -q."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from quantkit.utils.resources import peak_memory

if TYPE_CHECKING:
    from quantkit.quantization.report import MatrixReport


class RunProgress:
    """Shows blocks done, ETA, memory and the current layer's error on stderr."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self._quiet, self._verbose = quiet, verbose and not quiet
        self._last: MatrixReport | None = None
        self._started = time.monotonic()
        self._first: int | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("blocks"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[memory]}  {task.fields[layer]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("blocks", total=None, memory="", layer="")

    def __enter__(self) -> "RunProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def matrix(self, report: "MatrixReport") -> None:
        """A matrix was quantized."""
        self._last = report
        if self._bar is not None:
            self._bar.update(self._task, memory=_memory(), layer=_layer(report))
        if self._verbose:
            self._line(f"  {_layer(report)}  {report.snr_db:.1f} dB  {report.seconds:.1f} s  {report.note}".rstrip())

    def block(self, done: int, total: int) -> None:
        """Blocks that are written, of all."""
        if self._first is None:
            self._first = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif not self._quiet and done > self._first:
            left = (time.monotonic() - self._started) / (done - self._first) * (total - done)
            layer = _layer(self._last) if self._last else ""
            self._line(f"block {done}/{total}  ETA {int(left) // 60}m{int(left) % 60:02}s  {_memory()}  {layer}")

    def note(self, text: str) -> None:
        """Something the user should know."""
        if not self._quiet:
            self._line(f"note: {text}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            typer.echo(text, err=True)


def _memory() -> str:
    return f"{peak_memory() / 2**20:,.0f} MiB peak"


def _layer(report: "MatrixReport") -> str:
    return f"{report.name} error {report.output_error:.2e}"
