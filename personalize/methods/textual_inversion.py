"""Textual inversion (Gal et al. 2208.01618): only the embedding of new words trains, some vectors each.

The token becomes new entries of every tokenizer, "<sks>", "<sks>_1", "<sks>_2" as diffusers' loader names them, and a
prompt that says "<sks>" means all of them. Saved as `learned_embeds.safetensors`, of several subjects
`learned_embeds-<token>.safetensors` each: {"<sks>": (n,D)}, for SDXL {"clip_l": (n,D), "clip_g": (n,D2)}.

In SDXL bases whose text config has the old `eos_token_id` 2 plain transformers takes the pooled embedding at the token
with the largest id, the new one, instead of the prompt's end; here it is the end, and `fuse_embeddings` writes the right id.

B texts, L tokens, n vectors of a token, D width of a text encoder.
"""

import re
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn.functional import embedding

from personalize.common.errors import UserError
from personalize.common.files import slug
from personalize.common.recipe import Recipe
from personalize.core import rng
from personalize.formats import embedding as embedding_files
from personalize.methods import adapter_files, copy_all, require_folder
from personalize.models.interface import LatentModel

FILE = "learned_embeds"
SPREAD = 0.1  # of the noise that sets further vectors apart, in standard deviations of the row they start from


class Words(nn.Module):
    """A text encoder's embedding with learned rows after the known ones; only the learned rows train.

    Ids from `start` on are those of the learned rows, in the order in which the tokens were added.
    """

    def __init__(self, known: nn.Embedding, start: int):
        super().__init__()
        self.known, self.start, self.tokens, self.rows = known, start, [], nn.ParameterList()

    @property
    def weight(self) -> Tensor:
        """(V,D): the known rows, under the name that transformers reads."""
        return self.known.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B,L) -> (B,L,D)."""
        known = self.known(ids.clamp(max=self.start - 1))
        rows = torch.cat(list(self.rows)).to(known.dtype)
        return torch.where((ids < self.start)[..., None], known, embedding((ids - self.start).clamp(min=0), rows))

    def of(self, token: str) -> nn.Parameter:
        """(n,D) of a token."""
        return self.rows[self.tokens.index(token)]

    def to_embedding(self) -> nn.Embedding:
        """One plain embedding of all rows."""
        rows = torch.cat(list(self.rows)).to(self.weight.dtype)
        return nn.Embedding.from_pretrained(torch.cat([self.weight[: self.start], rows]).detach(), freeze=True)


def attach(model: LatentModel, recipe: Recipe) -> list[dict]:
    """A parameter group for each text encoder, with float32 rows of every token."""
    _files(recipe)
    if not (recipe.embedding.init or recipe.class_word):
        raise UserError("the vectors have no word to start from. Give the class, as in --class dog, or embedding.init.")
    for i, token in enumerate(recipe.token):
        word = recipe.embedding.init or recipe.class_word[min(i, len(recipe.class_word) - 1)]
        _add(model, token, {part: _first_rows(model, part, recipe, token=token, word=word) for part in model.text_encoders})
    return [
        {"name": part, "params": list(_words(model, part, recipe).values()), "lr": recipe.embedding.lr or recipe.train.lr}
        for part in model.text_encoders
    ]


def state(model: LatentModel, recipe: Recipe) -> dict[str, Tensor]:
    """{"<text encoder>.<token>": (n,D)}."""
    return {f"{part}.{k}": v for part in model.text_encoders for k, v in _words(model, part, recipe).items()}


def restore(model: LatentModel, recipe: Recipe, tensors: dict[str, Tensor]) -> None:
    copy_all(state(model, recipe), tensors, what=f"these embeddings were made for another base than {model.name!r}")


def save(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """Saves a file for each token, for diffusers' `load_textual_inversion`."""
    for token, name in _files(recipe).items():
        rows = {part: _words(model, part, recipe)[token].detach() for part in model.text_encoders}
        embedding_files.write_diffusers(folder / name, token, rows)


def load(model: LatentModel, folder: Path, recipe: Recipe) -> None:
    """Loads a run's embeddings. UserError where a file is missing or was made for another base."""
    for token, name in _files(recipe).items():
        load_embedding(model, require_folder(folder, name), token)


def load_embedding(model: LatentModel, path: Path, token: str = "") -> str:
    """Loads a user's embedding as `token`, or as the name in the file, or as the file's name -> the token.

    A folder with one `learned_embeds….safetensors` will do. UserError where the file is no embedding or was made for
    another base, or the word is known already.
    """
    path = _embedding_file(path)
    stored, rows = embedding_files.read_embedding(path)
    token = token or stored or path.stem
    _check_rows(model, path, rows)
    _add(model, token, rows)
    return token


def load_bundled(model: LatentModel, path: Path) -> list[tuple[str, str]]:
    """Loads the embeddings that are in a user's LoRA file -> (word, what to say of it) of each, "" for one left out.

    UserError for rows that are damaged or of another base.
    """
    if not path.is_file() or path.suffix != ".safetensors":
        return []
    told = []
    for word, rows in embedding_files.read_bundled(path).items():
        if not rows:
            told.append(("", f"{path.name} holds an embedding {word!r} of a kind that is not read: it is left out"))
        elif _is_known(model, word):
            told.append(("", f"{path.name} holds an embedding {word!r}, a word that has a meaning already: it is left out"))
        else:
            _check_rows(model, path, rows)
            _add(model, word, rows)
            told.append((word, f"{path.name} holds an embedding too: a prompt that says {word!r} uses it"))
    return told


def start_from(model: LatentModel, recipe: Recipe, source: Path) -> bool:
    """Copies the vectors of a file or folder into the tokens that train. UserError for another number of vectors."""
    files = _files(recipe)
    if source.is_dir():
        paths = {token: source / name for token, name in files.items() if (source / name).exists()}
    elif source.suffix == ".safetensors" and not adapter_files.holds_adapter(source):
        paths = {next(iter(files)): source}
    else:
        paths = {}
    for token, path in paths.items():
        rows = embedding_files.read_embedding(path)[1]
        _check_rows(model, path, rows)
        for part, given in rows.items():
            trained = _words(model, part, recipe)[token]
            if given.shape != trained.shape:
                raise UserError(
                    f"{path} has {len(given)} vectors, expected are {len(trained)}. Set embedding.vectors = {len(given)}."
                )
            trained.data.copy_(given)
    return bool(paths)


def fuse_embeddings(model: LatentModel) -> None:
    """Turns learned rows into rows of plain embeddings, which `save_pretrained` writes with the tokenizers that know them."""
    for part, encoder in model.text_encoders.items():
        table = encoder.get_input_embeddings()
        if isinstance(table, Words):
            encoder.set_input_embeddings(table.to_embedding())
            encoder.config.vocab_size = len(model.tokenizers[part])
            encoder.config.eos_token_id = model.tokenizers[part].eos_token_id


def _add(model: LatentModel, token: str, rows: dict[str, Tensor]) -> None:
    """Adds a token to every tokenizer, with its rows (n,D) by text encoder. UserError where it is not new."""
    n = len(next(iter(rows.values())))
    names = [token, *(f"{token}_{i}" for i in range(1, n))]
    if _is_known(model, token):
        raise UserError(f"{token!r} has a meaning in base {model.name!r} already. Give a new word, such as '<{token}>'.")
    for part, encoder in model.text_encoders.items():
        table, tokenizer = encoder.get_input_embeddings(), model.tokenizers[part]
        if not isinstance(table, Words):
            table = Words(table, len(tokenizer))
            encoder.set_input_embeddings(table)
        # a word of letters is no part of a longer one
        tokenizer.add_tokens([AddedToken(name, single_word=bool(re.fullmatch(r"\w+", name))) for name in names])
        table.tokens.append(token)
        table.rows.append(nn.Parameter(rows[part].to(model.device, torch.float32, copy=True), requires_grad=False))
        assert len(tokenizer) == table.start + sum(map(len, table.rows)), names
    model.learned_words[token] = " ".join(names)


def _is_known(model: LatentModel, token: str) -> bool:
    """Whether a tokenizer has this word, or reads it as one token or none."""
    tokenizers = model.tokenizers.values()
    return any(token in t.get_vocab() or len(t(token, add_special_tokens=False).input_ids) <= 1 for t in tokenizers)


def _first_rows(model: LatentModel, part: str, recipe: Recipe, *, token: str, word: str) -> Tensor:
    """(n,D): the tokens of a word in turn; when they repeat, with a little noise, or the vectors would stay alike."""
    ids = model.tokenizers[part](word, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f"embedding.init = {word!r} is no word to base {model.name!r}. Give one that says what the subject is.")
    known = model.text_encoders[part].get_input_embeddings().weight.detach().float().cpu()
    g, rows = rng.generator(recipe.seed, f"vectors/{part}/{token}"), []
    for k in range(recipe.embedding.vectors):
        row = known[ids[k % len(ids)]]
        noise = SPREAD * row.std() * torch.randn(row.shape, generator=g)
        rows.append(row + noise if k >= len(ids) else row)
    return torch.stack(rows)


def _words(model: LatentModel, part: str, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The rows of the recipe's tokens in one text encoder."""
    table = model.text_encoders[part].get_input_embeddings()
    return {token: table.of(token) for token in recipe.token}


def _files(recipe: Recipe) -> dict[str, str]:
    """{token: name of its file}. UserError where there is no token, or two would have files of one name."""
    if not recipe.token:
        raise UserError("there is no token to learn. Give a new word, such as --token '<subject>'.")
    if len(recipe.token) == 1:
        return {recipe.token[0]: f"{FILE}.safetensors"}
    names = {token: f"{FILE}-{slug(token)}.safetensors" for token in recipe.token}
    if len(set(names.values())) < len(recipe.token):
        raise UserError(f"tokens {', '.join(recipe.token)} would have files of the same name. Give words of other letters.")
    return names


def _embedding_file(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"there is no embedding {str(path)!r}. Give a .safetensors file.")
    if not path.is_dir():
        return path
    files = sorted(path.glob(f"{FILE}*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{path} has {len(files)} files {FILE}*.safetensors, expected is one. Give the file itself.")
    return files[0]


def _check_rows(model: LatentModel, path: Path, rows: dict[str, Tensor]) -> None:
    """UserError where the rows do not fit the base's text encoders."""
    wanted = {part: encoder.get_input_embeddings().weight.shape[1] for part, encoder in model.text_encoders.items()}
    if (has := {part: given.shape[1] for part, given in rows.items()}) != wanted:
        raise UserError(f"{path} was made for another base than {model.name!r}: its widths are {has}, expected are {wanted}.")
