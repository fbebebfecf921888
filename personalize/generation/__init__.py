"""Prompts and noise -> images: sampling configuration, sampling, diffusers' samplers."""
