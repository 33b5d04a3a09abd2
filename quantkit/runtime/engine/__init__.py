"""The engine: schedule, draft, forward, verify, postprocess. `Engine.step` shows the phases in order.

This room imports all the others of the runtime; of them, only `runtime.session` imports it.
"""
