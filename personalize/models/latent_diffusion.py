"""A latent diffusion base, whatever its family: VAE, U-Net, and text encoders that the family's module knows how to use.

B images, C latent channels, h w latent size. A family is a module with

TEXT                               {folder of a text encoder: (its class, folder of its tokenizer)}
encode_prompts(model, prompts, kept)  B texts -> the conditioning, tensors whose first dimension is B; kept (B,L) or None
unet_arguments(cond, size)         the conditioning as arguments of the U-Net; size: width and height of the image, px
HAS_SIZES                          whether it is conditioned on an image's size and crop too, as SIZES (B,6) float32
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from personalize.common.bases import has_world
from personalize.common.errors import UserError
from personalize.common.files import read_json
from personalize.common.image_size import Size, as_size
from personalize.core.guidance import Cond
from personalize.models import fast_unet, loading, prompt_chunks
from personalize.models.devices import to_device
from personalize.models.interface import LAYOUT, MASKED, SIZES
from personalize.models.lazy_imports import lazy_imports
from personalize.models.offload import Offload
from personalize.models.out_of_memory import DoesNotFit, free_cache, halved

with lazy_imports():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

CHANNELS_LAST_FROM = 8  # rows of a prediction from which a CPU is faster with the channels last
DECODED = 2 * 512**2  # px decoded at once, however many were denoised: in float32 an image of 512 px takes 0.8 GB here
TILE = (256, 512)  # px, smallest and largest edge of the tiled VAE's tiles; Stable Diffusion's VAEs were trained at 256


class LatentDiffusion:
    """A `LatentModel`. Its networks are in `dtype` and frozen, the VAE in float32 (in float16 SDXL's overflows).

    A method turns what trains into float32. Text encoders that `release` dropped are not among the `networks`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        family: ModuleType,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vae: str,
        fingerprint: str,
        make_network: Callable,
        offload: bool = False,
        chunks: int = 1,
        weighting: str = "",
        say: Callable[[str], None] = lambda line: None,
    ):
        unet_config, vae_config = loading.read_configs(folder, name)
        self.latent_channels = vae_config["latent_channels"]
        self.inpaints = unet_config["in_channels"] > self.latent_channels
        self._all_painted: dict[torch.Size, Tensor] = {}
        self.downscale = 2 ** (len(vae_config["block_out_channels"]) - 1)
        self.size = unet_config["sample_size"] * self.downscale
        self.folder, self.name, self.family, self.fingerprint = folder, name, family, fingerprint
        self.has_world = has_world(str(folder))
        self.device, self.dtype, self._vae_mode = device, dtype, vae
        self._make_network, self.say, self.most_at_once = make_network, say, {}
        self.index = read_json(folder / "model_index.json")
        self.schedule = loading.load_schedule(folder).to(device)
        self._texts, self._vae = self._read_texts(), self._read_vae()
        self.tokenizers = {
            part: loading.load_tokenizer(folder, place, most=config.max_position_embeddings, size=config.vocab_size)
            for part, (_, place) in family.TEXT.items()
            if (config := self._texts[part].config)
        }
        self.learned_words: dict[str, str] = {}
        self.token_rows = prompt_chunks.token_rows  # another where rows have words of their own: `methods.stacked_lora`
        self.chunks, self.weighting = chunks, weighting
        self.unet = self._read_unet(None if offload else device)
        self.uses_fast_unet = not fast_unet.why_not_fast(self.unet)
        self._offload = self._offloaded() if offload else None

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        if self._texts is None:
            self._texts = self._read_texts()
        return self._texts

    @property
    def vae(self) -> nn.Module:
        if self._vae is None:
            self._vae = self._read_vae()
        return self._vae

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, **(self._texts or {})}

    def release(self, *, vae: bool = False, texts: bool = False) -> None:
        self._vae = None if vae else self._vae
        self._texts = None if texts else self._texts
        free_cache(self.device)

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        if dtype == self.dtype:
            yield
            return
        own, networks = self.dtype, (self.unet, *self.text_encoders.values())
        weights = {id(w): w for w in (*(w for network in networks for w in network.parameters()), *self.waiting)}
        weights = [w for w in weights.values() if w.dtype == own]
        kept = [w.data for w in weights]  # the tensors themselves: what trains later has never been rounded
        try:
            for w in weights:
                w.data = w.data.to(dtype)
            self.dtype = dtype
            yield
        finally:
            self.dtype = own
            for w, data in zip(weights, kept, strict=True):
                w.data = data

    def read_again(self) -> None:
        self._texts, self.unet = None, self._read_unet(self.device)
        self.uses_fast_unet = not fast_unet.why_not_fast(self.unet)

    @property
    def waiting(self) -> list[Tensor]:
        return [p for places in self._offload.waiting for _, _, p in places] if self._offload else []

    def settle(self) -> None:
        if self._offload:
            self._offload.settle()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.vae.use_tiling = False  # each tile has statistics of its own, and the latents of a photo would be 7 to 16 % off
        with torch.autocast(self.device.type, enabled=False):  # half precision is for the U-Net
            posterior = self.vae.encode(images.to(self.device, torch.float32)).latent_dist
        shift, scale = self.vae.config.shift_factor or 0.0, self.vae.config.scaling_factor
        return (posterior.mean - shift) * scale, posterior.std * scale

    def decode_unclamped(self, z0: Tensor) -> Tensor:
        z, self.vae.use_tiling = self._unscaled(z0), self._vae_mode == "tiled"
        with torch.autocast(self.device.type, enabled=False):
            return self.vae.decode(z).sample

    def _unscaled(self, z0: Tensor) -> Tensor:
        return z0.to(self.device, torch.float32) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)

    @torch.no_grad()
    def decode_latents(self, z0: Tensor) -> Tensor:
        z, self.vae.use_tiling = self._unscaled(z0), self._vae_mode == "tiled"
        count = max(1, DECODED // (z.shape[-2] * z.shape[-1] * self.downscale**2))
        with torch.autocast(self.device.type, enabled=False):
            decoded = halved(
                lambda rows: self.vae.decode(z[rows]).sample.clamp(-1, 1),
                len(z),
                count,
                smaller=lambda n: free_cache(self.device),
            )
            try:
                return torch.cat(list(decoded))
            except DoesNotFit as error:
                raise DoesNotFit(
                    f"the VAE cannot decode one image on {self.device}: {error}. Use --set vae=tiled or a smaller image."
                ) from None

    def encode_prompts(self, prompts: list[str], kept: Tensor | None = None) -> Cond:
        return self.family.encode_prompts(self, prompts, kept)

    def size_conditions(self, originals: Sequence[Size], corners: Sequence[Size], size: int | Size) -> Cond:
        if not self.family.HAS_SIZES:
            return {}
        width, height = as_size(size)
        rows = [(h, w, top, left, height, width) for (w, h), (left, top) in zip(originals, corners, strict=True)]
        return {SIZES: to_device(torch.tensor(rows, dtype=torch.float32).reshape(-1, 6), self.device)}

    def tokens(self, part: str, prompts: list[str]) -> Tensor:
        """B texts -> (B n,C) ids of the text encoder `part`, a row for each of a prompt's n chunks."""
        return self.token_rows(self, part, prompts)

    def expand_words(self, prompt: str) -> str:
        """A prompt with every learned word replaced by all of its tokens; in any case, as CLIP reads it."""
        words = "|".join(re.escape(word) for word in sorted(self.learned_words, key=len, reverse=True))
        tokens_of = {word.lower(): tokens for word, tokens in self.learned_words.items()}
        if not words:
            return prompt
        # a whole word where its edge is a letter: "qmj" is no part of "qmjolnir", and "<sks>" may touch anything
        pattern = rf"(?:(?<!\w)|(?=\W))({words})(?!_\d)(?:(?!\w)|(?<=\W))"
        return re.sub(pattern, lambda match: tokens_of[match[1].lower()], prompt, flags=re.I)

    def says(self, text: str, word: str, *, whole: bool = True) -> bool:
        """Whether a text says a word as the tokenizer reads both: in any case, beside any mark. whole=False: before the cut."""
        tokenizer = next(iter(self.tokenizers.values()))
        reading = prompt_chunks.read_prompt(self, text)
        said = reading.ids if whole else reading.ids[: reading.count]
        wanted = tokenizer(self.expand_words(word), add_special_tokens=False).input_ids
        pieces = tokenizer.convert_ids_to_tokens(said)
        begins = [0, *(k + 1 for k, piece in enumerate(pieces) if piece.endswith(("</w>", ">")) or not piece.isalpha())]
        return bool(wanted) and any(said[k : k + len(wanted)] == wanted for k in begins)

    @torch.no_grad()
    def prepare(self, cond: Cond) -> Cond:
        arguments = self.family.unet_arguments(cond, self.size)
        if not self.uses_fast_unet:
            return cond
        return cond | fast_unet.text_keys_values(self.unet, arguments["encoder_hidden_states"], self._offload)

    def predict(self, z_t: Tensor, t: Tensor, cond: Cond, *, watch: fast_unet.Watch | None = None) -> Tensor:
        dtype = torch.get_autocast_dtype(z_t.device.type) if torch.is_autocast_enabled(z_t.device.type) else self.dtype
        exact = {key for key, value in cond.items() if key == SIZES or not value.is_floating_point()}  # bfloat16 has no 1999
        cond = {key: value if key in exact else value.to(dtype) for key, value in cond.items()}
        arguments = self.family.unet_arguments(cond, (z_t.shape[-1] * self.downscale, z_t.shape[-2] * self.downscale))
        if self.inpaints:
            masked = cond[MASKED][: len(z_t)] if MASKED in cond else self._nothing_kept(z_t)
            z_t = torch.cat([z_t, masked.to(z_t)], 1)
        if LAYOUT in cond:
            z_t = torch.cat([z_t, cond[LAYOUT][: len(z_t)].to(z_t)], 1)
        rows = len(arguments["encoder_hidden_states"])
        if not self.uses_fast_unet:
            assert watch is None, "only this package's own forward pass can be watched: see `require_control`"
            z_t, t = (fast_unet.repeated(x, rows) for x in (z_t.to(dtype), t))
            return self.unet(z_t, t, return_dict=False, **arguments)[0]
        # On a CPU many images at once are faster with the channels last, and one or two are slower.
        channels_last = z_t.device.type == "cuda" or (rows >= CHANNELS_LAST_FROM and not torch.is_grad_enabled())
        z_t = z_t.to(dtype, memory_format=torch.channels_last if channels_last else torch.preserve_format)
        prepared = {key: value for key, value in cond.items() if key.startswith(fast_unet.PREPARED)}
        text, added = arguments["encoder_hidden_states"], arguments.get("added_cond_kwargs")
        options = {"added": added, "prepared": prepared, "offload": self._offload, "watch": watch}
        out = fast_unet.fast_forward(self.unet, z_t, t, text, **options)
        return out.contiguous()

    def _nothing_kept(self, z_t: Tensor) -> Tensor:
        """MASKED (B,1+C,h,w) where the whole image is painted: ones, and latents of grey."""
        shape = z_t.shape[-2:]
        if shape not in self._all_painted:
            with torch.inference_mode(False):  # kept, so it must also do where gradients are computed
                z0 = self.encode_images(torch.zeros(1, 3, *(cells * self.downscale for cells in shape)))[0]
                self._all_painted[shape] = torch.cat([torch.ones_like(z0[:, :1]), z0], 1)
        return self._all_painted[shape].expand(len(z_t), -1, -1, -1)

    def truncated_words(self, prompt: str) -> str:
        reading = prompt_chunks.read_prompt(self, prompt)
        return next(iter(self.tokenizers.values())).decode(reading.ids[reading.count :])

    @property
    def prompt_record(self) -> dict:
        record = {"prompt_chunks": self.chunks} if self.chunks > 1 else {}
        return record | ({"prompt_weighting": self.weighting} if self.weighting else {})

    def _read_unet(self, device: torch.device | None) -> nn.Module:
        """The U-Net on `device`; None: where it is read to, from which its blocks are fetched."""
        layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        return self._make_network(UNet2DConditionModel, self.folder, "unet", self.dtype).to(device, memory_format=layout)

    def _offloaded(self) -> Offload:
        if why := fast_unet.why_not_fast(self.unet):
            raise UserError(
                f"train.offload = true is for U-Nets whose blocks are Stable Diffusion's, and of that of {self.name!r} {why}. "
                "Give train.offload=false."
            )
        if self.device.type != "cuda":
            self.say(f"train.offload saves nothing on {self.device.type}, whose memory is the host's")
        return Offload(self.unet, fast_unet.blocks_of(self.unet), self.device)

    def _read_texts(self) -> dict[str, nn.Module]:
        read = {part: self._make_network(kind, self.folder, part, self.dtype) for part, (kind, _) in self.family.TEXT.items()}
        return {part: module.to(self.device) for part, module in read.items()}

    def _read_vae(self) -> nn.Module:
        vae = self._make_network(AutoencoderKL, self.folder, "vae", torch.float32).to(self.device)
        if self._vae_mode != "whole":
            vae.enable_slicing()
        if self._vae_mode == "tiled":
            # diffusers' tiles are as large as the base's images, which are then one tile each, so that nothing is saved.
            vae.tile_sample_min_size = min(max(self.size // 2, TILE[0]), TILE[1])
            vae.tile_latent_min_size = vae.tile_sample_min_size // self.downscale
        return vae
