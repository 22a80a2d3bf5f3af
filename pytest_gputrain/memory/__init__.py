"""What training needs in memory: out-of-memory recognised, enforced, measured by category, and predicted.

Importing this package imports no torch; its modules do.
"""
