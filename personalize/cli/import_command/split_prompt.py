"""Splitting a subject's prompt into its token, its class, and a template with {token} and {class} in their place."""

import re
from typing import NamedTuple

_ENDS = set(re.findall(r"\w+", "in on at with by and near under over behind wearing holding as for from of"))
_SMALL = {"a", "an", "the", "my", "of", "photo", "picture", "image", "painting", "portrait", "style"}
_USUAL = {"sks", "ohwx", "zwx", "hta", "olis", "qwe", "xyz", "rkf", "tok"}  # words that guides use for a subject


class SplitPrompt(NamedTuple):
    """token, class_word: "" where the prompt does not say; photo, prior: templates; sure: False where token was guessed."""

    token: str
    class_word: str
    photo: str
    prior: str
    sure: bool


def split_prompt(prompt: str, class_prompt: str = "", *, token: str = "") -> SplitPrompt:
    """Split a prompt such as "a photo of sks dog", with the help of the class's "a photo of dog" where there is one.

    The token, where it is not given, is the word that the class prompt lacks, or one that looks made up, or else the last
    but one.
    """
    words, of_class = _words(prompt), _words(class_prompt)
    sure = True
    if not token:
        new = [word for word in words if word not in of_class and word.lower() not in _SMALL] if of_class else words
        made_up = [word for word in new if _looks_made_up(word)]
        if made_up or (of_class and new):
            token = made_up[0] if made_up else _before_the_class(new, words, of_class)
        else:
            token, sure = (words[-2] if len(words) > 1 and words[-2].lower() not in _SMALL | _ENDS else ""), False
    class_word = _class_after(prompt, token, class_prompt) if token else ""
    if not class_word and of_class:
        class_word = " ".join(word for word in of_class if word not in words and word.lower() not in _SMALL) or of_class[-1]
    photo, prior = _template(prompt, token, class_word), _template(class_prompt, "", class_word)
    return SplitPrompt(token, class_word, photo, prior, sure and bool(token))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\s,.;:!?]+", text)


def _looks_made_up(word: str) -> bool:
    """Whether a word is like <new1>, sks, TOK or abc12: no vowel, capitals only, letters with digits, or used in guides."""
    letters = re.sub(r"[^A-Za-z]", "", word)
    vowels = re.search(r"[aeiouy]", letters.lower())
    return (
        word.startswith("<") or word.lower() in _USUAL or (len(letters) > 2 and (not vowels or letters.isupper()))
        or (bool(letters) and any(c.isdigit() for c in word) and word[0].isalpha())
    )  # fmt: skip


def _before_the_class(new: list[str], words: list[str], of_class: list[str]) -> str:
    """Of the words that the class prompt lacks, the last before one that it has: qwe in "purple qwe backpack"."""
    followed = [word for word in new if words.index(word) + 1 < len(words) and words[words.index(word) + 1] in of_class]
    return (followed or new)[-1]


def _class_after(prompt: str, token: str, class_prompt: str) -> str:
    """The words after the token up to punctuation or a preposition; of those, what the class prompt says too."""
    rest = prompt.partition(token)[2]
    phrase = []
    for word in re.split(r"[,.;:!?]", rest)[0].split():
        if word.lower() in _ENDS or not re.fullmatch(r"[\w'-]+", word):
            break
        phrase.append(word)
    for k in range(len(phrase)):
        if class_prompt and re.search(_whole(" ".join(phrase[k:])), class_prompt):
            return " ".join(phrase[k:])
    return " ".join(phrase)


def _template(prompt: str, token: str, class_word: str) -> str:
    text = prompt.replace("{", "{{").replace("}", "}}")
    before, mark, after = text, "", ""
    if token and (match := re.search(_whole(token), text)):
        before, mark, after = text[: match.start()], "{token}", text[match.end() :]
    if class_word and mark:
        after = re.sub(_whole(class_word), "{class}", after, count=1)
    elif class_word:
        before = re.sub(_whole(class_word), "{class}", before, count=1)
    return before + mark + after


def _whole(words: str) -> str:
    """A pattern that matches these words as whole words."""
    return rf"(?<![\w<]){re.escape(words)}(?![\w>])"
