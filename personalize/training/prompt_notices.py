"""What a run says of its prompts before it trains: what is cut off, and what is read as letters."""

from collections.abc import Iterator

from personalize.common.prompts import fill, weights_read_as_text
from personalize.common.recipe import Recipe, needs_class_images
from personalize.data.subjects import Subject
from personalize.evaluation.protocols import dev_templates
from personalize.models.interface import LatentModel
from personalize.models.prompt_chunks import longer


def prompt_notices(model: LatentModel, recipe: Recipe, subjects: list[Subject]) -> list[str]:
    """Of all but captions too long, which `data.captions` says. UserError for an unknown placeholder."""
    captions = [photo.caption for subject in subjects for photo in subject.photos if photo.caption]
    named = list(_prompts(recipe, model.has_world))
    notices = weights_read_as_text([recipe.train.prompt, *captions, *(text for _, text in named)], model.weighting)
    for key, text in named:
        for subject in subjects:
            if rest := model.truncated_words(fill(text, subject.token, subject.class_word)):
                notices.append(f"{key} is too long for this base, which does not see {rest!r} ({longer(model)})")
                break
    return notices


def _prompts(recipe: Recipe, has_world: bool) -> Iterator[tuple[str, str]]:
    """Keys and templates of what the run draws and what it preserves."""
    yield "prior.prompt", recipe.prior.prompt
    if needs_class_images(recipe):
        yield "prior.negative", _literal(recipe.prior.negative)
    if recipe.choose.every:
        yield from (("a prompt of choose.prompts", text) for text in dev_templates(recipe.choose.prompts, has_world))
    if recipe.choose.every or recipe.train.sample_every:
        yield "draw.negative", _literal(recipe.draw.negative)


def _literal(text: str) -> str:
    """A text as a template that says it: negative prompts are not filled in."""
    return text.replace("{", "{{").replace("}", "}}")
