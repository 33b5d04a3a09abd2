"""quantkit: make large language models small and fast, and prove that they still work."""

__version__ = "0.1.0"
