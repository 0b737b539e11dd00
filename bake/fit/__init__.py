"""The fit: pure estimators, one a file, and `run`, which measures for them."""
