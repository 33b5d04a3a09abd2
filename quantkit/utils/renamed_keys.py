"""Keys of recipes that have been renamed. Files with the old keys stay readable; only the new keys are written."""

from collections.abc import Mapping
from typing import Any

#: Old key of a recipe -> its name now.
RENAMED = {"drift": "asymmetric_calibration", "sweeps": "coordinate_descent_passes"}


def with_current_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe under their names of today, in the given order.

    Raises:
        ValueError: a field is given under its old and under its new name.
    """
    for old, new in RENAMED.items():
        if old in recipe and new in recipe:
            raise ValueError(f"'{old}' is the old name of '{new}'; give only '{new}'")
    return {RENAMED.get(key, key): value for key, value in recipe.items()}
