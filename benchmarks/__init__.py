"""Benchmarks: each defines its terms, measures in processes of its own and ends in JSON."""
