"""PPAP: experts by noise range, low-rank adapters that let a network of clean images see noisy ones."""
