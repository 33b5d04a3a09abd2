"""Speculative generation: proposers that draft tokens, rejection sampling that verifies them, and the controller that decides
how long drafts are.
"""
