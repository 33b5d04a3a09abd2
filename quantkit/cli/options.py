"""Options that several verbs share, and how their values are read. `--help` imports this module, so it imports no torch."""

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import complete
from quantkit.errors import QuantkitError, RecipeError, ResourceError
from quantkit.runtime.kv_cache.dtypes import KV_DTYPES
from quantkit.runtime.kv_cache.eviction import FULL, POLICIES
from quantkit.runtime.speculative.proposers import MAX_DRAFT_LEN

if TYPE_CHECKING:
    from rich.console import Console

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Local folder, Hub id (owner/name), or 'demo' (SmolLM2-135M-Instruct).")
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:N, or auto: the GPU if there is one.")]
KvDtype = Annotated[
    str,
    typer.Option(
        "--kv-dtype",
        "--kv-cache-dtype",
        metavar="TYPE",
        autocompletion=complete.names(KV_DTYPES),
        help=f"How the KV cache stores keys and values: {KV_DTYPES.alternatives()}. auto: as the checkpoint does.",
    ),
]
KvPolicy = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        autocompletion=complete.names([FULL, *POLICIES]),
        help=f"Which past tokens a sequence keeps. {FULL}: all; "
        + "; ".join(f"{name}: {policy.description}" for name, policy in POLICIES.items())
        + ".",
    ),
]
KvBudget = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", help="Tokens that a sequence keeps, at most. Every --kv-policy but full needs it."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write everything that is shown to FILE as JSON; '-': to stdout.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print neither progress nor tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback for every error.")]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_size(text: str, option: str, bare: str = "B") -> int:
    """Bytes that "8GiB" names; a number alone is in the unit `bare`.

    Raises:
        RecipeError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or (match[2] or bare).upper() not in _UNITS:
        raise RecipeError(f"{option} {text}: not a size; write for example 8GiB or 500MB")
    return int(float(match[1]) * _UNITS[(match[2] or bare).upper()])


def draft_length(text: str) -> int | None:
    """The number in `--draft-len`; None for "auto".

    Raises:
        RecipeError: it is neither, or out of bounds.
    """
    if text == "auto":
        return None
    if not (text.isdecimal() and 1 <= int(text) <= MAX_DRAFT_LEN):
        raise RecipeError(f"--draft-len {text}: write a number from 1 to {MAX_DRAFT_LEN}, or auto")
    return int(text)


def fraction(text: str | None, option: str) -> float | None:
    """0.02 for "2%" and for "0.02".

    Raises:
        RecipeError: it is neither.
    """
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise RecipeError(f"{option} {text}: not a number; write for example 2% or 0.02") from None
    if not 0 <= value < float("inf"):
        raise RecipeError(f"{option} {text}: must not be negative")
    return value


def console(json_file: Path | None, *, quiet: bool = False) -> "Console":
    """Where tables go: stdout, or stderr if JSON goes to stdout.

    Files and pipes get lines of 160 characters, so that names of matrices are not cut.
    """
    from rich.console import Console

    stderr = str(json_file) == "-"
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ else 160
    return Console(stderr=stderr, quiet=quiet, width=wide)


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    """The value as JSON in a file that appears complete, on stdout for "-", nowhere for None.

    Raises:
        ResourceError: the file cannot be written.
    """
    if path is None:
        return
    text = json.dumps(value, indent=2)
    if str(path) == "-":
        typer.echo(text)
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({error.strerror})") from None


def require_writable(path: Path | None) -> None:
    """Find out before hours of work that `--json` cannot be written.

    Raises:
        QuantkitError: its folder does not exist.
    """
    if path is not None and str(path) != "-" and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise QuantkitError(f"--json {path}: cannot be written there; name a file in a folder that exists")
