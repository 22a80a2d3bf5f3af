"""What results look like to people: plots. Importing this package imports neither torch nor matplotlib."""
