"""Branch parallelism: the branches of a step computed by several processes, which stay in lockstep."""
