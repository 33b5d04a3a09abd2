"""The version, stated once: the package, artifacts and the build read it here."""

__version__ = "0.1.0"
