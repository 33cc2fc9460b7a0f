"""Smooth Diffusion: a LoRA that makes images change evenly with the noise; loading it, training it."""
