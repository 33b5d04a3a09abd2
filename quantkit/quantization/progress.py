"""What a quantization reports while it runs."""

from typing import Protocol

from quantkit.quantization.report import MatrixReport


class Progress(Protocol):
    """Receives what happens, for display. During calibration, one call is made per micro-batch."""

    def matrix(self, report: MatrixReport) -> None:
        """A matrix was quantized."""

    def block(self, done: int, total: int) -> None:
        """`done` of `total` blocks are quantized and written."""

    def stage(self, name: str, done: int, total: int) -> None:
        """Within a block or the head: `done` of `total` micro-batches or pieces of the stage `name` are finished."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class NoProgress:
    """Ignores all progress."""

    def matrix(self, report: MatrixReport) -> None:
        """As in `Progress`."""

    def block(self, done: int, total: int) -> None:
        """As in `Progress`."""

    def stage(self, name: str, done: int, total: int) -> None:
        """As in `Progress`."""

    def note(self, text: str) -> None:
        """As in `Progress`."""
