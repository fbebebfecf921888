"""LoRAs and learned words of n subjects on one frozen base, in one pass: each row of a batch goes through its own subject's.

Each subject's layers are PEFT's, made by `methods.attach` as for a run of its own. They are taken out of the networks, and
a `StackedLora` computes with the factors of all subjects at once (mLoRA, Ye et al. 2312.02515, does so for language models).

n subjects, m rows of a batch of each, one subject after the other; r rank; C, O channels in and out; N tokens.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.common.recipe import Recipe
from personalize.common.recipe_sections import ADAPTERS
from personalize.methods import lora, peft_layers
from personalize.methods.textual_inversion import Words
from personalize.models import fast_unet, prompt_chunks
from personalize.models.interface import LatentModel


class StackedLora(nn.Module):
    """A frozen linear or convolution layer with a LoRA of each subject: row i of (n m,…) by subject i // m's."""

    def __init__(self, layers: Sequence[nn.Module], name: str = lora.NAME):
        super().__init__()
        self.base_layer, self.scale = layers[0].get_base_layer(), layers[0].scaling[name]
        # In a tuple, so that they stay the parameters of PEFT's layers alone.
        self.factors = tuple((layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        a, b = zip(*self.factors)
        base, b = self.base_layer(x), torch.stack(b)
        if isinstance(self.base_layer, nn.Linear):
            rows = x.reshape(len(a), -1, x.shape[-1])  # (n,m N,C)
            return base + self._scaled(torch.bmm(rows, torch.stack(a).mT), b.mT).view(base.shape)
        return base + self._of_images(x, a, b.flatten(2))

    def _of_images(self, x: Tensor, a: Sequence[Tensor], b: Tensor) -> Tensor:
        """scale B (A x) of images (n m,C,h,w), n times A (r,C,k,k), B (n,O,r) -> (n m,O,h',w')."""
        stride, padding = self.base_layer.stride, self.base_layer.padding
        low = torch.cat([F.conv2d(rows, factor, None, stride, padding) for rows, factor in zip(x.chunk(len(a)), a)])
        wide = self._scaled(b[:, None], low.flatten(2).unflatten(0, (len(a), -1)))  # (n,1,O,r) (n,m,r,h' w')
        return wide.view(len(x), -1, *low.shape[-2:])

    def _scaled(self, one: Tensor, other: Tensor) -> Tensor:
        """scale times the product, of which the smaller factor is scaled."""
        smaller = min(one.numel(), other.numel())
        if self.scale != 1:
            one, other = (one * self.scale, other) if one.numel() == smaller else (one, other * self.scale)
        return torch.matmul(one, other)


class StackedWords(nn.Module):
    """A text encoder's embedding for the rows of n subjects, whose learned words may have the same name and the same ids."""

    def __init__(self, tables: Sequence[Words]):
        super().__init__()
        self.tables, self.known = tuple(tables), tables[0].known

    @property
    def weight(self) -> Tensor:
        """(V,D): the known rows, under the name that transformers reads."""
        return self.known.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(n m,L) -> (n m,L,D)."""
        return torch.cat([table(rows) for table, rows in zip(self.tables, ids.chunk(len(self.tables)))])


@dataclass
class Attached:
    """What one subject's methods attached to the networks, outside them."""

    adapters: dict[str, tuple[dict[str, nn.Module], dict]]  # by network: of `peft_layers.take_adapters`
    tables: dict[str, Words]
    tokenizers: dict
    words: dict[str, str]


@dataclass
class Stack:
    """The subjects of one base. Outside of all contexts the base is bare, as it was loaded."""

    model: LatentModel
    tokenizers: dict = field(init=False)

    def __post_init__(self) -> None:
        self.tokenizers = self.model.tokenizers

    @contextmanager
    def attaching(self) -> Iterator[Attached]:
        """Inside, methods are attached for one more subject; afterwards what they attached is in its `Attached`."""
        attached = Attached({}, {}, copy.deepcopy(self.tokenizers), {})
        self.model.tokenizers, self.model.learned_words = attached.tokenizers, attached.words
        try:
            yield attached
        finally:
            attached.adapters, attached.tables = self._take()

    @contextmanager
    def alone(self, subject: Attached) -> Iterator[None]:
        """Inside, the model is that of a run of this subject alone."""
        model = self.model
        for part, (layers, configs) in subject.adapters.items():
            peft_layers.put_adapters(model.networks[part], layers, configs)
        for part, table in subject.tables.items():
            model.text_encoders[part].set_input_embeddings(table)
        model.tokenizers, model.learned_words = subject.tokenizers, subject.words
        training = {name: network.training for name, network in model.networks.items()}
        try:
            yield
        finally:
            for name, was in training.items():
                if name in model.networks:
                    model.networks[name].train(was)
            self._take()

    @contextmanager
    def together(self, subjects: Sequence[Attached]) -> Iterator[None]:
        """Inside, a batch holds as many rows of each of these subjects, one subject after the other, and so do prompts."""
        model, first = self.model, subjects[0]
        for part in first.adapters:
            layers = zip(*(subject.adapters[part][0].values() for subject in subjects), strict=True)
            stacked = {name: StackedLora(each) for name, each in zip(first.adapters[part][0], layers, strict=True)}
            peft_layers.put_layers(model.networks[part], stacked)
        for part in first.tables:
            model.text_encoders[part].set_input_embeddings(StackedWords([s.tables[part] for s in subjects]))
        model.token_rows = _token_rows_of(subjects)
        try:
            yield
        finally:
            model.token_rows = prompt_chunks.token_rows
            self._take()

    def leave(self) -> None:
        """The base as it was before subjects came."""
        for name, network in self.model.networks.items():
            network.eval().requires_grad_(False)
            if any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
                (network.disable_gradient_checkpointing if name == "unet" else network.gradient_checkpointing_disable)()

    def _take(self) -> tuple[dict, dict]:
        """Takes out of the model what is attached to it -> adapters and tables."""
        model, tables = self.model, {}
        for part, encoder in model.networks.items():
            table = encoder.get_input_embeddings() if part != "unet" else None
            if isinstance(table, Words | StackedWords):
                tables[part] = table
                encoder.set_input_embeddings(table.known)
        adapters = {part: peft_layers.take_adapters(network) for part, network in model.networks.items()}
        model.tokenizers, model.learned_words = self.tokenizers, {}
        return {part: taken for part, taken in adapters.items() if taken[0]}, tables


def _token_rows_of(subjects: Sequence[Attached]) -> Callable[[LatentModel, str, list[str]], Tensor]:
    """`prompt_chunks.token_rows` of as many prompts of each subject, each by its own tokenizer and words."""

    def token_rows(model: LatentModel, part: str, prompts: list[str]) -> Tensor:
        m, own, rows = len(prompts) // len(subjects), (model.tokenizers, model.learned_words), []
        for i, subject in enumerate(subjects):
            model.tokenizers, model.learned_words = subject.tokenizers, subject.words
            rows.append(prompt_chunks.token_rows(model, part, prompts[i * m : (i + 1) * m]))
        model.tokenizers, model.learned_words = own
        return torch.cat(rows)

    return token_rows


def check_together(model: LatentModel, recipe: Recipe) -> None:
    """UserError, with the reason, for what cannot train in one batch with other subjects."""
    train, why = recipe.train, ""
    dropout = any(
        fast_unet.has_dropout(network) or getattr(network.config, "attention_dropout", 0) for network in model.networks.values()
    )
    kinds = [name for name in train.methods if name not in ("lora", "textual-inversion")]
    if kinds and kinds[0] in ADAPTERS:
        why = f"{kinds[0]} is not a product of two matrices, of which a batch takes many at once; give train.methods=lora"
    elif kinds:
        why = f"{kinds[0]} trains weights of the base itself, of which there is one; give train.methods=lora"
    elif recipe.lora.dora and "lora" in train.methods:
        why = "lora.dora divides by the norm of each subject's whole weights; give lora.dora=false"
    elif train.quantize:
        why = "a quantized base computes by a library's own layers; give train.quantize=''"
    elif train.offload:
        why = "train.offload fetches blocks of one adapter; give train.offload=false"
    elif train.engine != "eager":
        why = f"train.engine={train.engine} keeps the addresses of one run's weights; give train.engine=eager"
    elif train.held_out_every:
        why = "train.held_out_every measures by one subject's weights between steps; give train.held_out_every=0"
    elif recipe.photos.shape != "square":
        why = f"photos.shape={recipe.photos.shape} has images of other sizes at each step; give photos.shape=square"
    elif recipe.prompt.weighting and "textual-inversion" in train.methods:
        why = "prompt.weighting is read with the words of one subject; give prompt.weighting=''"
    elif dropout:
        why = f"base {model.name!r} has dropout, whose random numbers would be others than in a run alone"
    if why:
        raise UserError(f"several subjects cannot train in one batch: {why}, or train them one by one.")
