"""Progress of a long command, on stderr: bars on a terminal, a line at least every 30 seconds elsewhere, nothing with -q."""

import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, TypeVar

from quantkit.cli.tables import duration
from quantkit.utils.resources import peak_memory

if TYPE_CHECKING:
    from rich.progress import TaskID

    from quantkit.quantization.report import MatrixReport

_P = TypeVar("_P", bound="Progress")

#: Seconds between two lines of a log, at most.
INTERVAL = 30.0


@dataclass
class _Stage:
    """One part of a command. `first` is how much was done when it began: a resumed run does not begin at 0.

    `total` is 0 where nobody knows how much there is to do.
    """

    name: str
    done: int
    total: int
    detail: str = ""
    first: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the time that the steps so far took; None before the first one."""
        steps = self.done - self.first
        return (time.monotonic() - self.started) / steps * (self.total - self.done) if steps > 0 else None

    def __str__(self) -> str:
        left = self.seconds_left
        so_far = f"{duration(time.monotonic() - self.started)} so far"
        parts = [
            f"{self.name} {self.done}/{self.total}" if self.total else self.name,
            so_far if left is None else f"ETA {duration(left)}",
            self.detail,
        ]
        return "  ".join(part for part in parts if part)


class Progress:
    """Shows what is done of what, and the time left. A context manager: nothing is printed after its end."""

    def __init__(self, *, quiet: bool, stage: str = "loading") -> None:
        """
        Args:
            quiet: show nothing.
            stage: what the command does until the first call of `advance`.
        """
        self._shown: _Bars | _Log | None = None
        if not quiet:
            # Kept from here on: the lm-evaluation-harness runs with another sys.stderr.
            self._shown = _Bars(sys.stderr) if sys.stderr.isatty() else _Log(sys.stderr, _Stage(stage, 0, 0))

    def __enter__(self: _P) -> _P:
        if self._shown is not None:
            self._shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._shown is not None:
            self._shown.stop()

    @property
    def is_log(self) -> bool:
        """Whether lines are printed, not bars."""
        return isinstance(self._shown, _Log)

    def advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """`done` of `total` steps of a stage are done; a total of 0 means that nobody knows how many there are."""
        if self._shown is not None:
            self._shown.advance(stage, done, total, detail)

    def line(self, text: str) -> None:
        """Print a line at once."""
        if self._shown is not None:
            self._shown.line(text)


class _Bars:
    """One bar per stage."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=Console(file=out),
        )
        self._bars: dict[str, TaskID] = {}

    def start(self) -> None:
        self._rich.start()

    def stop(self) -> None:
        self._rich.stop()

    def advance(self, stage: str, done: int, total: int, detail: str) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._rich.add_task(stage, total=total or None, detail=detail)
        self._rich.update(self._bars[stage], completed=done, total=total or None, detail=detail)

    def line(self, text: str) -> None:
        self._rich.console.print(text, highlight=False, markup=False)


class _Log:
    """A thread prints the current stage whenever nothing was printed for `INTERVAL` seconds."""

    def __init__(self, out: TextIO, stage: _Stage) -> None:
        self._out, self._stage = out, stage
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._printed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def advance(self, stage: str, done: int, total: int, detail: str) -> None:
        with self._lock:
            if stage != self._stage.name:
                self._stage = _Stage(stage, done, total, first=done)
            self._stage.done, self._stage.total, self._stage.detail = done, total, detail

    def line(self, text: str) -> None:
        with self._lock:
            self._print(text)

    def _run(self) -> None:
        while not self._ended.wait(max(0.0, self._printed + INTERVAL - time.monotonic())):
            with self._lock:
                if time.monotonic() >= self._printed + INTERVAL and not self._ended.is_set():
                    self._print(str(self._stage))

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)
        self._printed = time.monotonic()


class RunProgress(Progress):
    """Progress of a quantization, as `quantize_blocks` reports it: a log has a line for each block in addition."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        """
        Args:
            quiet: show nothing.
            verbose: print a line for each matrix.
        """
        super().__init__(quiet=quiet)
        self._verbose = verbose
        self._layer = ""
        self._blocks: _Stage | None = None

    def matrix(self, report: "MatrixReport") -> None:
        """A matrix was quantized."""
        self._layer = f"{report.name} error {report.output_error:.2e}"
        if self._blocks is not None:
            self.advance("blocks", self._blocks.done, self._blocks.total, self._detail())
        if self._verbose:
            self.line(f"  {self._layer}  {report.snr_db:.1f} dB  {report.seconds:.1f} s  {report.note}".rstrip())

    def block(self, done: int, total: int) -> None:
        """`done` of `total` blocks are written."""
        if self._blocks is None:
            self._blocks = _Stage("block", done, total, first=done)
        self._blocks.done = done
        self.advance("blocks", done, total, self._detail())
        if self.is_log and self._blocks.seconds_left is not None:
            self._blocks.detail = self._detail()
            self.line(str(self._blocks))

    def stage(self, name: str, done: int, total: int) -> None:
        """Within a block or the head, `done` of `total` parts of the stage `name` are finished."""
        if self._blocks is not None:
            detail = f"{name} {done}/{total}  {self._detail()}"
            self.advance("blocks", self._blocks.done, self._blocks.total, detail)

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.line(f"note: {text}")

    def _detail(self) -> str:
        return f"{peak_memory() / 2**20:,.0f} MiB peak  {self._layer}".rstrip()
