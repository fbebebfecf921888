"""What is done to a step's noise before it is added to latents. B images, C channels, h w latent size.

Both return new tensors; at strength 0 they are not called, so that no bit changes.
"""

import torch
from torch import Generator, Tensor


def with_offset(eps: Tensor, strength: float, generator: Generator) -> Tensor:
    """eps (B,C,h,w) -> eps + strength xi, xi (B,C,1,1) standard normal: a shift of each channel of an image as a whole.

    So training sees images of another mean brightness too (N. Guttenberg, "Diffusion with Offset Noise",
    www.crosslabs.org/blog/diffusion-with-offset-noise, 2023; 0.1 there, and --noise_offset of diffusers). It is part of eps:
    of the latents' noise and of the target.
    """
    return eps + strength * torch.randn(*eps.shape[:2], 1, 1, generator=generator).to(eps)


def perturbed(eps: Tensor, gamma: float, generator: Generator) -> Tensor:
    """eps (B,C,h,w) -> eps + gamma xi, xi (B,C,h,w) standard normal: the noise of the latents, while the target keeps eps.

    What sampling feeds back is off by the network's own error; this shows it such inputs (Ning et al. 2301.11706, algorithm 1;
    0.1 there, and --input_perturbation of diffusers).
    """
    return eps + gamma * torch.randn(eps.shape, generator=generator).to(eps)
