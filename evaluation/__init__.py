"""How good images are: distances, coverage, accuracy and likeness, with confidence intervals."""
