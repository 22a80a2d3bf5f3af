"""A run of many training steps: what drives it, what watches it, what it writes and how it resumes.

Judges, records and files are pure: they import no torch. What runs in a rank imports it inside functions.
"""
