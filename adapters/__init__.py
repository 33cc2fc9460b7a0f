"""Learned weights: loading, saving, training."""
