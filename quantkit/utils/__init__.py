"""Facts about the process and the machine, and small helpers for several rooms.

Imports the standard library and `quantkit.errors` only.
"""
