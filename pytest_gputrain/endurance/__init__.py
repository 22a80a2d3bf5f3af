"""Runs of many steps: what each step leaves in writing, and what is judged from it. Imports no torch."""
