"""Choices as data: a registry maps names to objects whose modules are imported only when an object is used.

Names and descriptions are plain text. `--help`, argument errors and the checks of a recipe therefore stay fast and import
neither torch nor any of the modules named here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Generic, TypeVar, cast

from quantkit.errors import QuantkitError

T = TypeVar("T")


class UnknownNameError(QuantkitError, KeyError):
    """A name that a registry does not hold. The message lists the names that it does."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes.


@dataclass(frozen=True)
class _Entry(Generic[T]):
    """One line of a registry.

    Attributes:
        source: "module:attribute", imported at the first use; or the object itself.
        description: one line for help texts and listings.
    """

    source: str | T
    description: str


class Registry(Mapping[str, T]):
    """Name -> object, in the order of registration.

    `in`, `len` and iteration look at names only. `registry[name]` imports the object's module at the first use and keeps
    the object.
    """

    def __init__(self, kind: str, entries: Mapping[str, tuple[str | T, str]]) -> None:
        """
        Args:
            kind: what the objects are, for error messages: "method", "format".
            entries: name -> ("module:attribute" or the object itself, one-line description).
        """
        self.kind = kind
        self._entries: dict[str, _Entry[T]] = {}
        self._resolved: dict[str, T] = {}
        for name, (source, description) in entries.items():
            self.register(name, source, description)

    def __getitem__(self, name: str) -> T:
        """The object of that name.

        Raises:
            UnknownNameError: the registry has no such name.
        """
        if name not in self._resolved:
            self._resolved[name] = self._resolve(self._entry(name).source)
        return self._resolved[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def choices(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._entries)

    def alternatives(self) -> str:
        """All names in one phrase: "a, b or c"."""
        *others, last = self._entries
        return f"{', '.join(others)} or {last}" if others else last

    def description(self, name: str) -> str:
        """The one-line description of that name; imports nothing.

        Raises:
            UnknownNameError: the registry has no such name.
        """
        return self._entry(name).description

    def require(self, name: str) -> str:
        """`name` itself, if the registry has it; imports nothing.

        Raises:
            UnknownNameError: the registry has no such name.
        """
        self._entry(name)
        return name

    def register(self, name: str, source: str | T, description: str) -> None:
        """Add an entry. For extensions; see `registered` for tests."""
        assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
        self._entries[name] = _Entry(source, description)

    def unregister(self, name: str) -> None:
        """Remove an entry.

        Raises:
            UnknownNameError: the registry has no such name.
        """
        del self._entries[self.require(name)]
        self._resolved.pop(name, None)

    @contextmanager
    def registered(self, name: str, source: str | T, description: str) -> Iterator[None]:
        """An entry that exists inside a `with` block only."""
        self.register(name, source, description)
        try:
            yield
        finally:
            self.unregister(name)

    def _entry(self, name: str) -> _Entry[T]:
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(f"unknown {self.kind} {name!r:.60}; choose from: {', '.join(self._entries)}") from None

    @staticmethod
    def _resolve(source: str | T) -> T:
        if not isinstance(source, str):
            return source
        module, _, attribute = source.partition(":")
        return cast(T, getattr(import_module(module), attribute))
