"""UniCon on Stable Diffusion's UNets: the checkpoint, joint attention between two sides, and the partner's own run."""
