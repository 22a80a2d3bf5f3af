"""Tensor parallel: plans, and the golden comparison with an independent single-process reference."""
