"""Commands beside the four: edit, distill, photos, tokens, many, plan, export, verify, import-command, pretrain, web."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from personalize.cli import options as opt
from personalize.common.errors import UserError
from personalize.common.prompts import read_prompts
from personalize.common.terminal import Terminal

app = typer.Typer()


@app.command()
@opt.with_settings(
    "draw.count", "draw.steps", "draw.guidance", "draw.negative", "draw.sampler", "draw.size", "seed", "device", "dtype"
)
def edit(
    source: Annotated[str, typer.Argument(help="What the image shows; {token} and {class} are filled in.")],
    target: Annotated[str, typer.Argument(help="What it is to show; default: the same words, for --weight and --ignore.")] = "",
    *,
    keep: Annotated[float, typer.Option(help="Share of sampling in which the words' places are the source's.")] = 0.8,
    keep_layout: Annotated[float, typer.Option(help="The same for attention within the image: its layout.")] = 0.4,
    image: Annotated[Path | None, typer.Option(help="A photo that SOURCE describes, in place of a drawn image.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="With --image: the share of sampling made anew; default: 0.7.", show_default=False)
    ] = None,
    local_blend: Annotated[
        bool, typer.Option("--local-blend", help="Change the image only where the words that differ are, by their maps.")
    ] = False,
    maps: opt.Maps = False,
    weight: opt.Weights = [], ignore: opt.Ignored = [], lora: opt.Loras = [], embedding: opt.Embeddings = [],
    run: opt.Run = None, checkpoint: opt.Checkpoint = "", base: opt.Base = "", settings: list[str],
    runs: opt.Runs = Path("runs"), out: Annotated[Path | None, typer.Option(help="Folder.")] = None, screen: Terminal,
):  # fmt: skip
    """An image again with other words: the source, the other words from the same noise, and with the source's layout."""
    from personalize.commands.edit import edit

    words = {
        "keep": keep,
        "keep_layout": keep_layout,
        "weights": weight,
        "ignore": ignore,
        "local_blend": local_blend,
        "maps": maps,
        "image": image,
        "strength": strength,
    }
    origin = {"run": run, "base": base, "checkpoint": checkpoint, "loras": lora, "embeddings": embedding, "runs": runs}
    result = edit(source, target, **words, **origin, settings=settings, out=out, screen=screen)
    return vars(result), result.sheet


@app.command()
@opt.with_settings("distill.steps", "distill.method", "distill.teacher", "distill.updates", "seed", "device", "dtype")
def distill(
    *,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="Text file to learn by, a prompt a line.")] = None,
    run: opt.Run = None, base: opt.Base = "", settings: list[str], runs: opt.Runs = Path("runs"), screen: Terminal,
):  # fmt: skip
    """A student of a run, or with --base alone of a bare base: it draws in few steps, and is a run of its own."""
    from personalize.commands.distill import distill

    settings = opt.settings_of(settings, {"distill.prompts": read_prompts(prompts_file) if prompts_file else []})
    result = distill(run, base=base, settings=settings, runs=runs, screen=screen)
    return vars(result), result.folder


@app.command()
@opt.with_settings("device")
def export(
    run: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest finished one.")] = None,
    *,
    to: Annotated[str, typer.Option(help="diffusers, single-file, kohya or a1111-embedding.")] = "",
    fuse: Annotated[bool, typer.Option("--fuse", help="Bake an adapter into its base.")] = False,
    half: Annotated[bool, typer.Option("--half", help="In half precision.")] = False,
    out: Annotated[Path | None, typer.Option(help="The file or folder to write; default: in the run's folder export.")] = None,
    check: Annotated[bool, typer.Option(help="Draw with it in a fresh process; keep it only if that is right.")] = True,
    push: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the hub, private unless --public.")] = "",
    public: Annotated[bool, typer.Option("--public", help="With --push: for everyone to see.")] = False,
    with_photos: Annotated[bool, typer.Option("--with-photos", help="With --push: publish the photos too.")] = False,
    checkpoint: opt.Checkpoint = "", base: opt.Base = "", settings: list[str], runs: opt.Runs = Path("runs"), screen: Terminal,
):  # fmt: skip
    """A run as files for diffusers, AUTOMATIC1111, ComfyUI or kohya's scripts, checked by drawing with them."""
    if not to:
        raise UserError("which format? Give --to diffusers, single-file, kohya or a1111-embedding.")
    from personalize.commands.export import export

    source = {"checkpoint": checkpoint, "base": base, "settings": settings, "runs": runs}
    form = {"to": to, "fuse": fuse, "half": half, "out": out, "check": check}
    upload = {"push": push, "public": public, "with_photos": with_photos}
    result = export(run, **source, **form, **upload, screen=screen)
    values = {"file": result.files[0], "files": result.files, "check": vars(result.check) if result.check else None}
    return values | {"url": result.url}, result.files[0]


@app.command()
def photos(
    source: Annotated[list[str], typer.Argument(metavar="PHOTOS", help="A folder, files, or hf:owner/name/config.")],
    size: Annotated[int, opt.setting_option("photos.size")] = 0,
    base: opt.Base = "toyland",
    crop: Annotated[str, opt.setting_option("photos.crop")] = "center",
    shape: Annotated[str, opt.setting_option("photos.shape")] = "square",
    out: Annotated[Path, typer.Option(help="The HTML page of what was found.")] = Path("photos.html"),
    mask: Annotated[
        str, typer.Option(metavar="word:WORD|FILE", help="How photos without a mask get one: the base finds WORD, or U²-Net.")
    ] = "",
    caption: Annotated[bool, typer.Option("--caption", help="Write a caption beside each photo that has none.")] = False,
    class_word: Annotated[str, typer.Option("--class", help="With --caption: what the subject is, such as dog.")] = "",
    captioner: Annotated[
        str, typer.Option(metavar="FOLDER", help="With --caption: a CLIP, BLIP or Florence-2; default: the base's CLIP.")
    ] = "",
    quiet: opt.Quiet = False, as_json: opt.Json = False,
):  # fmt: skip
    """What is wrong with these photos, and what will training see of them? Status 1 where a file cannot be used."""
    from personalize.commands.check_photos import check_photos

    made = {"mask": mask, "caption": caption, "class_word": class_word, "captioner": captioner}
    options = {"size": size, "base": base, "crop": crop, "shape": shape, "out": out}
    result = check_photos(opt.one_or_all(source), **options, **made, screen=Terminal(quiet=quiet or as_json))
    values = {"sheet": result.page, "findings": [asdict(finding) for finding in result.findings]}
    values |= {"captions": result.captions} if caption else {}
    print(json.dumps(values, default=str) if as_json else result.page)
    raise typer.Exit(bool(result.unusable))


@app.command()
@opt.with_settings("train.steps", "train.lr", "base", "seed", "device", "dtype")
def many(
    manifest: Annotated[str, typer.Argument(help="JSONL, CSV or Parquet: id, photos, class, settings; or a folder.")],
    *,
    method: opt.Methods = [],
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only every N-th row, from row I; I from 0 to N-1.")] = "",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try rows again that failed before.")] = False,
    together: Annotated[int, typer.Option(min=1, help="Rows whose LoRAs or words train in one batch.")] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray: on a cluster at RAY_ADDRESS, or one that begins here.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="With --engine ray: processes that share the rows.")] = 1,
    cpus: Annotated[int, typer.Option(min=0, help="Of each worker, and its threads; 0: as many as without an engine.")] = 0,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="Of each worker, such as 0.5; default: as the device needs.", show_default=False)
    ] = None,
    recipe: opt.RecipeFile = None, settings: list[str], runs: opt.Runs = Path("runs"), priors: opt.Priors = Path("priors"),
    screen: Terminal,
):  # fmt: skip
    """Many subjects, one run each, on one warm base; status 3 where rows failed. The same command goes on where it stopped."""
    from personalize.commands.many import many

    settings = opt.settings_of(settings, {"train.methods": method})
    folders, options = {"runs": runs, "priors": priors}, {"shard": shard, "retry_failed": retry_failed, "screen": screen}
    options |= {"together": together, "engine": engine, "workers": workers, "cpus": cpus, "gpus": gpus}
    result = many(manifest, recipe=recipe, settings=settings, **folders, **options)
    failed = [f"failed   {row['id']}: {row['error']}" for row in result.rows if row["status"] == "failed"]
    line = f"{len(result.rows) - result.failed} done, {result.failed} failed"
    values = vars(result) | {"failed": result.failed}
    return values, "\n".join([*failed, line, str(result.file)]), opt.REQUIRED if result.failed else 0


@app.command()
@opt.with_settings("base", "device", "dtype")
def plan(
    photos: Annotated[list[str] | None, typer.Argument(help="A folder, files, or hf:owner/name/config.")] = None,
    *,
    class_word: Annotated[list[str], typer.Option("--class", help="What the subject is, such as dog.")] = [],
    many: Annotated[str, typer.Option("--many", metavar="MANIFEST", help="The subjects of `personalize many`.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="With --many: how many share the rows.")] = 1,
    method: opt.Methods = [],
    recipe: opt.RecipeFile = None, settings: list[str], screen: Terminal,
):  # fmt: skip
    """Memory and time of a training run on this machine, before it begins; status 1 where it does not fit."""
    if bool(photos) == bool(many):
        raise UserError("which photos? Give a folder of 3 to 5 and its --class, or --many and a manifest.")
    settings = opt.settings_of(settings, {"train.methods": method, "class_word": class_word})
    if many:
        from personalize.commands.plan_many import plan_many

        result = plan_many(many, workers=workers, recipe=recipe, settings=settings, screen=screen)
    else:
        from personalize.commands.plan import plan

        result = plan(opt.one_or_all(photos), recipe=recipe, settings=settings, screen=screen)
    switch = getattr(result, "switch", "") or "nothing helps here"
    if result.fits:
        line = f"it fits: {result.peak / 1e9:.2f} of {result.free / 1e9:.2f} GB"
    else:
        line = "it does not fit; next: " + ("personalize plan PHOTOS says what to turn" if many else switch)
    return vars(result) | {"fits": result.fits, "line": line}, line, not result.fits


@app.command()
def tokens(
    base: opt.Base = "toyland",
    limit: Annotated[int, typer.Option(help="How many.")] = 20,
    device: opt.Device = "cpu", as_json: opt.Json = False,
):  # fmt: skip
    """Rare words of a base, one token each, the weakest prior first."""
    from personalize.commands.rare_tokens import token_lines, tokens

    rows = tokens(base, limit=limit, settings=opt.settings_of([], {"device": device}))
    print(json.dumps([asdict(row) for row in rows]) if as_json else "\n".join(token_lines(rows)))


@app.command()
@opt.with_settings("seed", "device")
def upscale(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files; for Toyland of 64×64 px.")],
    *,
    base: opt.Base = "toyland", settings: list[str],
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("upscaled"), screen: Terminal,
):  # fmt: skip
    """Images twice as large, with edges that bicubic interpolation has not, by the upscaler of a base."""
    from personalize.commands.upscale import upscale

    files = upscale(images, base=base, settings=settings, out=out, screen=screen)
    return {"files": files}, "\n".join(map(str, files))


@app.command()
@opt.with_settings("device")
def verify(
    run: Annotated[Path | None, typer.Argument(help="Run folder; default: the newest finished one.")] = None,
    *,
    steps: Annotated[int, typer.Option(min=0, help="At most so many steps are trained again; 0: none.")] = 10,
    base: opt.Base = "", settings: list[str], runs: opt.Runs = Path("runs"), screen: Terminal,
):  # fmt: skip
    """Is a run what its manifest says, and do its steps give the same again? Status 3 where not; nothing is written."""
    from personalize.commands.verify import verify

    result = verify(run, steps=steps, base=base, settings=settings, runs=runs, screen=screen)
    lines = [*(f"ok       {line}" for line in result.passed), *(f"differs  {line}" for line in result.failed)]
    return vars(result), "\n".join(lines), opt.REQUIRED if result.failed else 0


@app.command("import-command")
def import_command(
    command: Annotated[str, typer.Argument(help="A command line of diffusers or PEFT, in quotes.")], as_json: opt.Json = False
):
    """The recipe that does the same work as another trainer's command."""
    from personalize.cli.import_command import foundation, recipe_from, toml
    from personalize.commands.session import resolve

    imported = recipe_from(command)
    text = toml(imported, start=resolve(None, foundation(imported)))
    print(json.dumps(vars(imported) | {"recipe": text}) if as_json else text, end="\n" if as_json else "")


@app.command()
def pretrain(
    out: Annotated[Path, typer.Argument(help="Folder for the base.")],
    work: Annotated[Path, typer.Option(help="Folder for stages; a stopped one goes on.")] = Path("pretraining"),
    preset: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    until: Annotated[str, typer.Option(help="Stop after world, vae, clip, identity, unet or probes.")] = "",
    part: Annotated[str, typer.Option(help="One part for the base that is in OUT already (docs/toyland.md).")] = "",
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as unet_steps=4000.")] = [],
    quiet: opt.Quiet = False, as_json: opt.Json = False,
):  # fmt: skip
    """Make Toyland's weights from nothing (two and a half hours on 2 cores)."""
    from personalize.commands.pretrain import pretrain

    base = pretrain(
        out, work=work, preset=preset, settings=set_, until=until, part=part, screen=Terminal(quiet=quiet or as_json)
    )
    print(json.dumps({"base": base, "work": work}, default=str) if as_json else base or work)


@app.command()
def web(
    folder: Annotated[Path, typer.Argument(help="Workspace: the folder with runs/, priors/ and photos/.")] = Path(),
    host: Annotated[str, typer.Option(help="Address it listens at; 0.0.0.0: every one, with a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0: the first free one.")] = 7860,
    password: Annotated[str, typer.Option(help="What the page asks for; another --host makes one.")] = "",
    base: Annotated[list[str], typer.Option(help="Base outside the workspace that may be used. May be given again.")] = [],
):
    """The page: photos, training, drawing, comparing and runs, in a browser."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio: pip install 'personalize[web]'")
    from personalize.web.app import serve

    serve(folder, host=host, port=port, password=password, bases=tuple(base), say=lambda line: print(line, flush=True))
