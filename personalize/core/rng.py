"""Randomness is an argument: every draw names what it is for, so nothing depends on what was drawn before."""

import hashlib

import torch
from torch import Generator, Tensor


def generator(seed: int, purpose: str, k: int = 0) -> Generator:
    """A fresh CPU generator for (seed, purpose, k), the same on every machine and in every process.

    `purpose` says what is drawn ("step", "image", ...), `k` which one (training step, image number). The hash keeps
    neighbours apart: `seed + k` would make image 1 of seed 0 equal image 0 of seed 1.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{k}".encode(), digest_size=8).digest()
    return Generator("cpu").manual_seed(int.from_bytes(digest, "big") & (2**63 - 1))


def normal(generators: list[Generator], shape: tuple[int, ...]) -> Tensor:
    """B generators, shape of one image -> (B, *shape) standard normal, float32 on the CPU.

    Row i depends on generator i alone. The values are those of diffusers' `randn_tensor` for the same list.
    """
    return torch.stack([torch.randn(shape, generator=g) for g in generators])
