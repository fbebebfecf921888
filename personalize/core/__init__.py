"""Latent diffusion and guidance: pure tensor maths. Imports torch and `personalize.errors` only."""
