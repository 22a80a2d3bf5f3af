"""The batch size that fits: search, probe, discovery, cache, and the arithmetic of gradient accumulation.

Importing this package imports no torch, and neither do its pure modules, the search and the accumulation
plan.
"""
