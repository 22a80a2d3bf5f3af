"""A package whose ``train`` is run with ``-m``: it has relative imports."""
