"""Fused operators: a Triton kernel where there is a GPU for it, and an eager reference everywhere else."""
