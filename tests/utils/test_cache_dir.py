"""Which environment variables decide where the cache is."""

from pathlib import Path

import pytest

from quantkit.utils.cache_dir import cache_dir


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"QUANTKIT_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/quantkit"),
        ({"HOME": "/c"}, "/c/.cache/quantkit"),
        ({"HOME": "/c", "XDG_CACHE_HOME": "", "QUANTKIT_CACHE": ""}, "/c/.cache/quantkit"),
    ],
)
def test_cache_dir(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str) -> None:
    for name in ("QUANTKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(folder)
