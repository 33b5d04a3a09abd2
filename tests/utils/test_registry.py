"""Registries: what is known without an import, when objects are imported, and what unknown names are told."""

import sys
from fractions import Fraction

import pytest

from quantkit.errors import QuantkitError
from quantkit.utils.registry import Registry, UnknownNameError


def fractions() -> Registry[Fraction]:
    return Registry("fraction", {"half": (Fraction(1, 2), "One of two."), "third": (Fraction(1, 3), "One of three.")})


def test_names_keep_their_order() -> None:
    registry = fractions()
    assert registry.choices() == list(registry) == ["half", "third"]
    assert len(registry) == 2
    assert registry["third"] == Fraction(1, 3)
    assert dict(registry) == {"half": Fraction(1, 2), "third": Fraction(1, 3)}


def test_names_and_descriptions_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    registry: Registry[object] = Registry("color", {"hls": ("colorsys:rgb_to_hls", "Hue first.")})
    assert "hls" in registry
    assert "yiq" not in registry
    assert registry.choices() == ["hls"]
    assert registry.description("hls") == "Hue first."
    assert registry.require("hls") == "hls"
    assert "colorsys" not in sys.modules
    first = registry["hls"]
    assert first is sys.modules["colorsys"].rgb_to_hls


def test_an_object_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[object] = Registry("color", {"hls": ("colorsys:rgb_to_hls", "Hue first.")})
    first = registry["hls"]
    monkeypatch.setattr("colorsys.rgb_to_hls", None)
    assert registry["hls"] is first


@pytest.mark.parametrize("name", ["quarter", "", "x" * 100])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    registry = fractions()
    for use in (registry.__getitem__, registry.description, registry.require, registry.unregister):
        with pytest.raises(UnknownNameError) as error:
            use(name)
        assert str(error.value) == f"unknown fraction {name!r:.60}; choose from: half, third"
        assert isinstance(error.value, QuantkitError)
    assert registry.get(name) is None


def test_entries_come_and_go() -> None:
    registry = fractions()
    with registry.registered("quarter", Fraction(1, 4), "One of four."):
        assert registry.choices() == ["half", "third", "quarter"]
        assert registry["quarter"] == Fraction(1, 4)
    assert registry.choices() == ["half", "third"]
    assert registry.get("quarter") is None
    registry.register("quarter", Fraction(2, 8), "One of four.")
    assert registry["quarter"] == Fraction(1, 4)
    with pytest.raises(AssertionError, match="fraction 'half' is registered twice"):
        registry.register("half", Fraction(1, 2), "Again.")


def test_an_entry_goes_even_after_an_error() -> None:
    registry = fractions()
    with pytest.raises(ZeroDivisionError), registry.registered("none", Fraction(0), "Nothing."):
        Fraction(1, registry["none"])
    assert "none" not in registry
