"""The engine: schedule, draft, forward, verify, postprocess.

The only room that sees all the others; none of them imports it.
"""
