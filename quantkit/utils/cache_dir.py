"""Where quantkit keeps what is costly to make."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$QUANTKIT_CACHE, or quantkit/ in the user's cache."""
    if own := os.environ.get("QUANTKIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"
