"""Data types that every other room of the runtime passes around: requests, sequences, batches and outputs, and the protocols
of a model and of a constraint. Imports nothing else of the runtime.
"""
