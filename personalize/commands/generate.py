"""`personalize generate`: images of prompts, by a run or by its bare base, and by LoRA and embedding files on top."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from personalize.commands.embeddings import Drawn, embed, is_embedded
from personalize.commands.image_source import bare_base, loaded_run, put_base_student, put_files, put_layout, remarks
from personalize.commands.session import PRIORS, RUNS, open_run, resolve
from personalize.common.errors import UserError
from personalize.common.files import writing
from personalize.common.recipe import Recipe
from personalize.common.terminal import SILENT, Terminal
from personalize.data.image_grid import grid
from personalize.data.image_prompt import read_image_prompt
from personalize.data.image_to_edit import ImageToEdit, read_image_to_edit
from personalize.data.map_sheet import map_sheet
from personalize.generation.attention_control import require_control
from personalize.generation.attention_maps import require_maps, word_maps
from personalize.generation.image_files import image_row, open_folder, out_folder, write_beside, write_image
from personalize.generation.inpainting import Canvas, paste_kept, sampling_options
from personalize.generation.sampling import (
    image_generators,
    image_size,
    require_images,
    sample_latents,
    sampling_batches,
    to_pil,
)
from personalize.generation.upscaling import PURPOSE, Upscaling, open_upscaling
from personalize.generation.words import PLAIN, Emphasis, read_emphasis, require_said, require_words
from personalize.models.image_adapter import ImagePrompt
from personalize.models.interface import LatentModel


@dataclass(frozen=True)
class GenerateResult:
    """files: the images, prompt by prompt; grid: all of them as one image, a prompt a row; maps: a sheet for each image."""

    files: list[Path]
    grid: Path
    maps: list[Path] = field(default_factory=list)


def generate(
    prompts: Sequence[str],
    *,
    run: Path | str | None = None,
    base: str = "",
    checkpoint: str = "",
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    weights: Sequence[str] = (),
    ignore: Sequence[str] = (),
    image: Path | None = None,
    mask: Path | str | None = None,
    strength: float | None = None,
    careful: int = 1,
    image_prompt: Path | str = "",
    image_scale: float | None = None,
    adapter: Path | None = None,
    unclip: bool = False,
    vary: Sequence[Path | str] = (),
    was: str | None = None,
    photos: Path | str = "",
    class_word: str = "",
    maps: bool = False,
    fast: bool = False,
    layout: Path | None = None,
    upscale: bool = False,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    out: Path | None = None,
    screen: Terminal = SILENT,
) -> GenerateResult:
    """`draw.count` images of each prompt by a run (the newest finished one in `runs`), or by a bare base.

    {token} and {class} in a prompt are filled in with the run's. loras ("FILE" or "FILE:weight") and embeddings ("FILE" or
    "FILE:word") are files of any program, put on top. weights ("hat=1.5") and ignore: words that count more or less, and words
    that do not count; each belongs to the prompts that say it. image: a file to begin with, whose middle square is drawn anew
    by `strength` (0 to 1), or only where the file `mask` is white ("word:hat": where it shows this word of the prompt, by the
    base's attention); careful: how often each step is made then. image_prompt: a photo or a folder of them that the base is
    told beside the prompt, by an adapter of its own or the file `adapter`; image_scale: how much it counts (0: not at all, 1:
    as trained). unclip: from an image embedding that the base's prior draws of the prompt; vary: a photo, whose variations are
    drawn, or two, for what lies between them; was: what the one photo shows before the prompt changes it. photos, class_word:
    whom draw.like draws a bare base to; priors: where its class images lie. maps: also a sheet for each image that shows where
    it attends to each word. fast: by the base's own student, in its few steps. layout: a file of boxes that say where what is
    to be. upscale: twice as large, by the base's upscaler. out: a folder, where images.jsonl gets a row an image. Image i of a
    seed starts from the same noise for every prompt. UserError names what is wrong.
    """
    emphasis = read_emphasis(weights, ignore)
    edit = read_image_to_edit(image, mask, strength, careful)
    beside = {"--image": image, "--image-prompt": image_prompt, "--fast": fast, "--layout": layout, "--maps": maps}
    beside |= {"--weight": weights, "--ignore": ignore}
    by_embedding = is_embedded(prompts, unclip=unclip, vary=vary, was=was, bare=bool(base and not run), others=beside)
    if mask is not None:  # other samplers lean less on what is kept: docs/editing.md
        settings = ["draw.sampler=ddpm", *settings]
    if (photos or class_word) and (run or not base):
        raise UserError("--photos and --class tell a bare base, --base, whom --like means. A run has photos of its own.")
    steered = {"photos": photos, "class_word": class_word, "settings": settings, "priors": Path(priors), "screen": screen}
    if base and not run:
        model, recipe, prompts, origin, home = bare_base(list(prompts), base, settings, screen)
        steer = _steering(model, recipe, **steered)
    else:
        opened = open_run(run, runs=runs, base=base, settings=settings, screen=screen, of_base=True)
        if fast and "student" in opened[3]:
            raise UserError(f"--fast: {opened[0]} is a student and draws in few steps by itself. Leave out --fast.")
        steer = _steering(opened[1], opened[2], run=(opened[0], opened[3]), **steered)
        model, recipe, prompts, origin, home = loaded_run(list(prompts), *opened, at=checkpoint, screen=screen)
    origin |= steer.record if steer else {}
    recipe, record = put_base_student(model, recipe, settings) if fast else (recipe, {})
    origin |= record
    embedded = None
    if by_embedding:  # by the base's own networks, before files are put on top
        embedded = embed(model, prompts, vary=vary, was=was, count=recipe.draw.count, seed=recipe.seed)
        origin |= embedded.record
    origin |= put_files(model, loras=loras, embeddings=embeddings, screen=screen)
    require_words(model, prompts, emphasis)
    if maps:
        require_maps(model, recipe.draw)
        if edit and edit.strength == 0:
            raise UserError("--strength 0 draws nothing anew, so that no word has a map. Give more, or leave out --maps.")
    if edit and edit.word:
        require_control(model)
        prompt = require_said(model, prompts, edit.word, "--mask is to find in the image")
        edit = edit.masked_by(model, prompt, image_size(model, recipe.draw))
    folder = out_folder(out or home)
    for line in remarks(model, prompts, recipe.draw.negative, origin):
        screen.say(line)
    canvas = _canvas(model, recipe, edit, screen) if edit else None
    told, record = read_image_prompt(model, image_prompt, scale=image_scale, adapter=adapter)
    origin |= emphasis.record | (edit.identity if edit else {}) | record
    upscaling = open_upscaling(model, image_size(model, recipe.draw)) if upscale else None
    origin |= upscaling.identity if upscaling else {}
    options = {"emphasis": emphasis, "canvas": canvas, "image_prompt": told, "steer": steer, "maps": maps}
    options |= {"upscaling": upscaling, "embedded": embedded}
    if layout is not None:
        options["layout"], record = put_layout(model, layout, image_size(model, recipe.draw))
        origin |= record
    return _write_images(model, recipe, prompts, out=folder, origin=origin, **options, screen=screen)


def _steering(
    model: LatentModel, recipe: Recipe, *, photos: Path | str, class_word: str, settings: Sequence[str], priors: Path, screen,
    run: tuple[Path, dict] | None = None,
):  # fmt: skip
    """What is drawn towards besides the prompt -> steering.Steering, or None. `model` is still the bare base.

    On a bare base photos are cut, and class images drawn, as `train` and `prior` do it, whatever is drawn then.
    """
    draw, subject, tokens = recipe.draw, None, [entry["token"] for entry in run[1]["subjects"]] if run else []
    if not run and not bool(draw.like) == bool(photos) == bool(photos or class_word):
        raise UserError("--like on a bare base needs --photos and --class, and they are for nothing else: give all, or none.")
    if not (draw.like or draw.guide_clip or draw.guide_image):
        return None
    from personalize.training import steering  # encoders and training with it

    if draw.like and run:
        subject = steering.of_run(*run)
    elif draw.like:
        own = [text for text in settings if not text.strip().startswith(("draw.", "seed"))]
        own = resolve(None, [*own, f"base={recipe.base}"])
        subject = steering.of_photos(photos, class_word, own, own.photos.size or model.size)
    return steering.prepare(model, recipe, subject, tokens=tokens, priors=priors, screen=screen)


def _canvas(model: LatentModel, recipe: Recipe, edit: ImageToEdit, screen: Terminal) -> Canvas:
    if edit.visits > 1 and recipe.draw.sampler != "ddpm":
        raise UserError(
            f"--careful {edit.visits} goes back and forth between the steps of ddpm, and the sampler is {recipe.draw.sampler}. "
            "Leave out --sampler, or --careful."
        )
    if edit.strength > 0 and round(edit.strength * recipe.draw.steps) == 0:
        raise UserError(
            f"--strength {edit.strength:g} of {recipe.draw.steps} steps is none, and the image stays as it is. Give more of "
            "either: --strength, --steps."
        )
    size = image_size(model, recipe.draw)
    (width, height), (across, down) = edit.photo.size, size
    if width * down != height * across:
        part = "square" if across == down else f"part in the shape of {across}×{down}"
        screen.say(f"{edit.photo.name} is {width}×{height} px: its middle {part} is drawn. For another part, crop it first.")
    canvas = edit.canvas(size)
    if edit.word:
        screen.say(f"mask of {edit.word!r}: {canvas.mask.mean():.0%} of the image is painted anew")
    return canvas


def _write_images(
    model: LatentModel, recipe: Recipe, prompts: list[str], *, out: Path, origin: dict, screen: Terminal,
    emphasis: Emphasis = PLAIN, canvas: Canvas | None = None, image_prompt: ImagePrompt | None = None, steer=None,
    maps: bool = False, upscaling: Upscaling | None = None, layout: Tensor | None = None, embedded: Drawn | None = None,
) -> GenerateResult:  # fmt: skip
    config, seed = recipe.draw, recipe.seed
    jobs = [(prompt, i) for prompt in prompts for i in range(config.count)]
    rows_by_file = open_folder(out)
    options = sampling_options(model, canvas, config.steps) if canvas else lambda count: {}
    files, images, sheets = [], [], []
    with screen.progress("drawing", len(jobs), unit="images") as advance:
        for part in sampling_batches(model, len(jobs), config):
            texts, numbers = zip(*(jobs[k] for k in part))
            noises = [0] * len(part) if embedded and embedded.one_noise else list(numbers)
            generators, beginning = image_generators(seed, noises), options(len(part))
            if steer:  # the known region last, which nothing moves
                beginning = beginning | {"steer": in_turn(steer.of(texts), beginning.get("steer"))}
            attention = [] if maps else None
            beginning |= {"encoded": embedded.states[part.start : part.stop]} if embedded else {}
            beginning = beginning | {"emphasis": emphasis, "image": image_prompt, "layout": layout, "maps": attention}
            z0 = sample_latents(model, list(texts), generators, config, **beginning)
            drawn = require_images(model.decode_latents(z0), model)
            drawn = paste_kept(drawn, canvas, model.downscale) if canvas else drawn
            if upscaling:
                drawn = upscaling.enlarge(drawn, image_generators(seed, list(numbers), PURPOSE))
            for k, (image, prompt, i) in enumerate(zip(to_pil(drawn), texts, numbers, strict=True)):
                row = image_row(model, recipe, prompt, origin=origin, index=i, size=image.size)
                files.append(write_image(out, image, row, rows_by_file))
                images.append(image)
                if maps:
                    sheet = map_sheet(image, word_maps(model, prompt, attention[k]))
                    sheets.append(write_beside(out, sheet, row, "maps"))
            advance(len(part))
    with writing(out / "grid.png") as temporary:
        grid(images, config.count if len(prompts) > 1 else min(4, config.count)).save(temporary)
    return GenerateResult(files, out / "grid.png", sheets)


def in_turn(first: Callable, then: Callable | None) -> Callable:
    """Two steerings of `sample_latents` as one; the second sees what the first has made."""
    return first if then is None else lambda guided, rows: then(first(guided, rows), rows)
