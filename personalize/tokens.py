"""The rare token that will stand for the subject: one token, short, late in the vocabulary (DreamBooth §3.2)."""

from personalize.errors import UserError
from personalize.models.base import LatentModel

KNOWN = {"sks": "a rifle", "ohwx": "two tokens in CLIP"}


def choose(model: LatentModel, wanted: str) -> tuple[str, str]:
    """The token to train, and a word about it ("" where there is nothing to say). UserError for an unusable one.

    Toyland knows "sks" as a word without meaning; for other bases a rare one is looked up in the vocabulary.
    """
    if wanted:
        return wanted, _remark(model, wanted)
    if model.name == "toyland":
        return "sks", ""
    found = rare(model)
    return found, f"token: {found!r}, rare in the vocabulary of {model.name!r} (--set token=… for another)"


def rare(model: LatentModel) -> str:
    """The last word of three letters in the vocabulary that is one token and comes back unchanged from its id."""
    vocabulary = model.tokenizer.get_vocab()
    words = sorted((i, w.removesuffix("</w>")) for w, i in vocabulary.items() if w.endswith("</w>"))
    for _, word in reversed(words):
        if len(word) == 3 and word.isascii() and word.isalpha() and word not in KNOWN and _ids(model, word) == 1:
            return word
    raise UserError(f"the vocabulary of {model.name!r} has no rare word of three letters. Give one: --set token=…")


def _ids(model: LatentModel, word: str) -> int:
    return len(model.tokenizer(word, add_special_tokens=False).input_ids)


def _remark(model: LatentModel, word: str) -> str:
    if not word.strip() or word != word.strip() or len(word.split()) > 1:
        raise UserError(f"token {word!r} is not one word. Give a short rare one, such as 'sks'.")
    pieces = _ids(model, word)
    if pieces > 1:
        return f"token {word!r} is {pieces} tokens to {model.name!r}, each with a meaning; a single rare one learns better."
    if word in KNOWN and model.name != "toyland":
        return f"token {word!r} has a meaning of its own in most bases: {KNOWN[word]}."
    return ""
