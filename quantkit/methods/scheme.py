"""How one matrix is quantized: bits, group size, symmetry. Plain data, so that recipes are read without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; -1 means all columns of a row.
        symmetric: zero point fixed at 2^(bits-1).
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def levels(self) -> int:
        """Largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    def group_columns(self, columns: int) -> int:
        """Columns in one group of a matrix with `columns` columns."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` columns; the group size must divide it."""
        width = self.group_columns(columns)
        assert columns % width == 0, f"group size {width} does not divide {columns}"
        return columns // width

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits}-bit {group} {'sym' if self.symmetric else 'asym'}"
