"""Names of devices."""

import torch

from quantkit.errors import RecipeError


def resolve_device(name: str) -> torch.device:
    """The torch device that "auto", "cpu", "cuda" or "cuda:N" names; "auto" is the GPU where there is one.

    Raises:
        RecipeError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()):
        raise RecipeError(f"--device {name}: this machine has no such device; use cpu")
    return chosen
