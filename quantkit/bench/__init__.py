"""Load tests of an OpenAI-compatible server, measured by its clients.

Works with any such server, so it imports nothing of quantkit but errors.
"""
