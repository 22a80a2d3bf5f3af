"""Whole training scripts, for the phase plan: run as they are, as ``__main__``."""
