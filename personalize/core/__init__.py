"""Latent diffusion and guidance: pure tensor maths. Imports torch and `personalize.common.errors` only."""
