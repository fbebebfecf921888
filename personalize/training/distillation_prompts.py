"""Prompts by which a student learns."""

from personalize.common.errors import UserError
from personalize.common.recipe import Recipe
from personalize.evaluation import protocols
from personalize.toyland.world.scenes import ACTIONS, PLACES, accessory_words, colour_word, sample_scene, with_article

SEED, COUNT = 21_000_000, 256  # of Toyland's scenes, which no other part uses


def prompt_templates(recipe: Recipe, *, has_world: bool, of_subject: bool) -> tuple[str, ...]:
    """The recipe's own; else for a Toyland scenes as its captions tell them, and else the prompts checkpoints are chosen by.

    of_subject: with {token} and {class}. UserError for a base without a subject that is no Toyland: what is it to learn?
    """
    if given := tuple(dict.fromkeys(recipe.distill.prompts)):
        return given
    if has_world:
        return tuple(_of_scene(SEED + k, of_subject=of_subject) for k in range(COUNT))
    if not of_subject:
        raise UserError("which prompts? A student learns by them alone. Give a file of some hundred captions: --prompts FILE")
    return (recipe.train.prompt, *protocols.DEV)


def _of_scene(seed: int, *, of_subject: bool) -> str:
    scene = sample_scene(seed)
    noun = "a {token} {class}" if of_subject else with_article(f"{colour_word(scene.subject.body)} {scene.subject.class_word}")
    accessory = accessory_words(scene.accessory) if scene.accessory else ""
    return " ".join(filter(None, (noun, accessory, ACTIONS[scene.action], PLACES[scene.place])))
