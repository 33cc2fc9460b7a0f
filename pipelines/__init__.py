"""How a Diffusers pipeline becomes guidable."""
