"""What every base can do, whatever its family: images <-> latents, prompts -> conditioning, one prediction.

B images, C latent channels, h w latent size.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, device, dtype, nn

from personalize.common.image_size import Size
from personalize.core.guidance import Cond
from personalize.core.schedule import Schedule

SIZES = "sizes"  # in a conditioning: height, width of the image to begin with, top, left of its crop, height, width now; px
# In the conditioning of an inpainting base, (B,1+C,h,w): a mask, 1 is painted, and latents of the image, grey where painted.
MASKED = "masked"
LAYOUT = "layout"  # in the conditioning of a base with boxes, (B,K,h,w): see `models.layout`


class LatentModel(Protocol):
    """VAE, text encoders and U-Net of a base; nothing outside `models` knows of which family it is."""

    name: str  # as the user wrote it: "toyland", a hub id or a folder
    folder: Path  # the diffusers folder it was read from
    fingerprint: str  # of its weights
    has_world: bool  # whether it is a Toyland, whose truth is known
    schedule: Schedule
    size: int  # px that it was trained at
    latent_channels: int
    downscale: int  # px of a latent cell
    inpaints: bool  # whether its U-Net also takes a mask and a masked image: MASKED, without which all is painted
    device: device
    dtype: dtype  # the type it computes in; trained weights stay float32
    unet: nn.Module
    text_encoders: dict[str, nn.Module]  # by their folder in a base: "text_encoder", for SDXL also "text_encoder_2"
    tokenizers: dict[str, Any]  # transformers' own, by the text encoder they belong to
    chunks: int  # of tokens that a prompt has, encoded apart: see `prompt_chunks`
    weighting: str  # "compel" where "(hat:1.3)" in a prompt is a weight, "" where it is text
    prompt_record: dict  # {"prompt_chunks": 2, "prompt_weighting": "compel"}, as records of images say it; {} by default
    learned_words: dict[str, str]  # a learned word -> all of its tokens, "<sks>": "<sks> <sks>_1"; see textual inversion
    say: Callable[[str], None]  # tells the user a line
    most_at_once: dict[Size, int]  # size of an image -> as many as were found to fit at once, where that was too few
    networks: dict[str, nn.Module]  # "unet" and the text encoders, as far as they are in memory
    waiting: list[Tensor]  # the U-Net's weights that wait in the host's memory, see `offload`

    def release(self, *, vae: bool = False, texts: bool = False) -> None:
        """Drop parts from memory, unchanged ones only; they are read again when something asks for them."""

    def computing_in(self, dtype: dtype) -> AbstractContextManager[None]:
        """A context in which U-Net and text encoders are as if loaded in `dtype`; after it their own weights are back."""

    def read_again(self) -> None:
        """The U-Net and the text encoders as the base has them, in place of those that trained."""

    def settle(self) -> None:
        """After a method has added or unfrozen weights: these are on the device from here on, whatever waits on the host."""

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B,3,H,W) in [-1,1] -> mean and standard deviation of the scaled posterior, each (B,C,h,w) float32."""

    def decode_latents(self, z0: Tensor) -> Tensor:
        """(B,C,h,w) scaled -> (B,3,H,W) float32 in [-1,1]."""

    def decode_unclamped(self, z0: Tensor) -> Tensor:
        """As `decode_latents`, of as many as are decoded at once, not cut off at -1 and 1, so that a gradient reaches z0."""

    def encode_prompts(self, prompts: list[str], kept: Tensor | None = None) -> Cond:
        """B texts -> tensors whose first dimension is B, for `predict`.

        kept (B,L): False at the tokens that the text encoders do not read for those after them; all are read without it.
        """

    def size_conditions(self, originals: Sequence[Size], corners: Sequence[Size], size: int | Size) -> Cond:
        """B images' sizes to begin with, corners of their crops once resized, their size now -> {SIZES: (B,6)} beside the
        prompts.

        {} where the base is not told. Without it images are of their size from the start, and not cropped.
        """

    def prepare(self, cond: Cond) -> Cond:
        """The conditioning with all that is the same at every sampling step, computed once; valid until a weight changes."""

    def predict(self, z_t: Tensor, t: Tensor, cond: Cond, *, watch: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        """(B,C,h,w), (B,), cond of kB rows -> raw output (kB,C,h,w): each part of B rows has the same z_t and t.

        watch: told the queries (kB,H,N,c) and keys (kB,H,L,c) of each attention to the text, in H heads of N latent cells.
        """

    def expand_words(self, prompt: str) -> str:
        """A prompt with every learned word replaced by all of its tokens."""

    def says(self, text: str, word: str, *, whole: bool = True) -> bool:
        """Whether a text says a word as the tokenizer reads both; whole=False: in what is not cut off."""

    def truncated_words(self, prompt: str) -> str:
        """The words at a prompt's end that do not fit and are cut off; "" where all fit."""
