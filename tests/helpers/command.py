"""Runs the command line for tests: in this process, or in a separate one that can be killed.

Processes are forked from a server that has everything imported, so each costs a fraction of a second. A test gives such a
process a fault: a callable that runs in it before the command does.
"""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from quantkit.cli import main, progress

#: Calibration that is just large enough for several micro-batches in both streams.
FAST = ("--samples", "80", "--seq-len", "64")

_PATIENCE = 120.0
_SERVER = multiprocessing.get_context("forkserver")
#: Verbs import their modules only when they run; the fork server imports them once for all.
_SERVER.set_forkserver_preload(
    [
        "pytest",
        "quantkit.api",
        "quantkit.cli.progress",
        "quantkit.cli.quantize",
        "quantkit.formats.convert",
        "quantkit.quantization.estimate",
        "transformers.models.llama.modeling_llama",
    ]
)


#: Runs `quantkit ARGUMENTS` and prints, as the last line of stderr, which modules it has imported.
REPORT_IMPORTS = """
import json, sys
from quantkit.cli import main, progress
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


@dataclass(frozen=True)
class Done:
    """A command that ended: exit status and what it printed."""

    status: int
    out: str
    err: str


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def quantkit(*arguments: object, terminal: bool = False, interval: float = 3600.0) -> Done:
    """Run `quantkit ARGUMENTS` in this process.

    Args:
        arguments: of the command line.
        terminal: whether stdout and stderr are a terminal.
        interval: seconds between two lines of progress in a log. The default is so long that even a slow machine prints none.
    """
    stream, argv = _Terminal if terminal else io.StringIO, sys.argv
    out, err = stream(), stream()
    sys.argv = ["quantkit", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), mock.patch.object(progress, "INTERVAL", interval):
            main()
    except SystemExit as end:
        return Done(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
    raise AssertionError("main returned")


def refused(*arguments: object) -> str:
    """The error line of `quantkit ARGUMENTS`, which must fail. A line about the KV cache before it is ignored."""
    done = quantkit(*arguments)
    assert done.status == 2, done
    assert done.out == ""
    (line,) = (each for each in done.err.splitlines() if not each.startswith("KV cache "))
    assert line.startswith("error: ")
    return line


def imported_by(*arguments: object, status: int = 0, program: str = REPORT_IMPORTS) -> set[str]:
    """The modules that `quantkit ARGUMENTS` imports in a separate interpreter."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def start(log: Path, *arguments: object, fault: Callable[[], None] | None = None) -> BaseProcess:
    """Start `quantkit ARGUMENTS` in a separate process, whose output goes to `log`."""
    process = _SERVER.Process(target=_run, args=(log, tuple(map(str, arguments)), fault), daemon=True)
    process.start()
    return process


def ended(process: BaseProcess) -> int:
    """The exit status of a process, negative if a signal ended it."""
    process.join(_PATIENCE)
    assert process.exitcode is not None, "the command hangs"
    return process.exitcode


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds."""
    end = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def signal_at_change(folder: Path, number: int, what: signal.Signals = signal.SIGKILL, *, of: str = "") -> Callable[[], None]:
    """A fault: a signal just before the `number`th change of the file system below `folder`.

    With `of`, the `number`th renaming of something to that name.
    """
    return partial(_signal_at_change, str(folder), number, what, of)


def _signal_at_change(folder: str, number: int, what: signal.Signals, of: str) -> None:
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        changes |= event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if of:
            changes = event == "os.rename" and str(args[1]).endswith(of)
        if changes and str(args[0]).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), what)

    sys.addaudithook(hook)


def _run(log: Path, arguments: tuple[str, ...], fault: Callable[[], None] | None) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["quantkit", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
    if fault is not None:
        fault()
    main()
