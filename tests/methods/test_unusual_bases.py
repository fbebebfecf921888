"""Whatever a base's folder looks like, a whole model that is saved from it opens with plain diffusers."""

import json
import shutil
from pathlib import Path

import pytest

import personalize
from personalize.commands.export import open_plainly, verify
from personalize.common.errors import UserError
from personalize.common.recipe import Recipe
from personalize.common.recipe_sections import Lora, Train
from personalize.formats import safetensors_io
from personalize.methods import full, lora
from personalize.models import load_model
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    from diffusers import DiffusionPipeline


def _resaved(base, folder, **options):
    DiffusionPipeline.from_pretrained(base).save_pretrained(folder, safe_serialization=True, **options)
    shutil.copytree(base / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def half_only(base, folder):
    _resaved(base, folder, variant="fp16")


def sharded(base, folder):
    _resaved(base, folder, max_shard_size="100KB")


def half_only_and_sharded(base, folder):
    _resaved(base, folder, variant="fp16", max_shard_size="100KB")


def both_precisions(base, folder):
    _resaved(base, folder, variant="fp16")
    shutil.copytree(base, folder, dirs_exist_ok=True)


def custom_classes(base, folder):
    """As an author's own pipeline writes them: code beside the weights, which plain diffusers asks to trust."""
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"unet": ["my_unet", "MyUNet"], "vae": ["my_vae", "MyVAE"], "text_encoder": ["my_text", "MyEncoder"]}
    index |= {"scheduler": ["my_scheduler", "MyScheduler"], "tokenizer": ["my_words", "MyTokenizer"]}
    index |= {"safety_checker": ["my_checker", "Checker"], "controller": ["my_controller", "Controller"]}
    index |= {"_name_or_path": "/home/someone/base"}
    for part in ("unet", "vae", "safety_checker", "controller"):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / f"my_{part}.py").write_text("raise SystemExit('a stranger's code ran')")
    (folder / "model_index.json").write_text(json.dumps(index))


def symbolic_links(base, folder):
    """As in the hub's cache: every file is a link to a blob elsewhere."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for k, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        place = folder / path.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(k))
        place.symlink_to(f"{'../' * len(path.relative_to(base).parts)}blobs/{k}")


def linked_folders(base, folder):
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path)


PHOTOS = Path(__file__).parents[2] / "data_examples" / "dog"
BASES = [half_only, sharded, half_only_and_sharded, both_precisions, custom_classes, symbolic_links, linked_folders]


@pytest.mark.parametrize("unusual", BASES)
def test_a_saved_model_opens_with_plain_diffusers_whatever_its_base_looks_like(tiny_sd, tmp_path, unusual):
    base, folder = tmp_path / "base", tmp_path / "saved"
    unusual(tiny_sd, base)
    model = load_model(str(base), device="cpu", dtype="float32")
    recipe = Recipe(train=Train(methods=("full",)))
    full.attach(model, recipe)
    model.unet.conv_in.weight.data.add_(1)
    folder.mkdir()
    full.save(model, folder, recipe)
    assert open_plainly.open_base(folder) == ""
    opened = DiffusionPipeline.from_pretrained(folder)
    for part, network in (*model.networks.items(), ("vae", model.vae)):
        for (name, p), q in zip(network.named_parameters(), getattr(opened, part).parameters(), strict=True):
            assert p.equal(q.float()), f"{part}.{name}"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.is_symlink() or path.suffix == ".py" or "fp16" in path.name]
    assert "/home/someone" not in (folder / "model_index.json").read_text()
    model.unet.conv_in.weight.data.sub_(1)
    full.load(model, folder, recipe)
    assert model.unet.conv_in.weight.equal(opened.unet.conv_in.weight)


@pytest.fixture
def random_encoder(tiny_sd, tmp_path):
    """A base whose text encoder transformers would replace by random numbers, with a warning."""
    base = tmp_path / "base"
    shutil.copytree(tiny_sd, base)
    weights = base / "text_encoder" / "model.safetensors"
    tensors = safetensors_io.load_tensors(weights)
    safetensors_io.save_tensors(weights, {f"other.{key}": value for key, value in tensors.items()}, {"format": "pt"})
    return base


def test_a_folder_whose_weights_plain_diffusers_does_not_take_is_told(random_encoder):
    assert open_plainly.open_base(random_encoder).startswith("it does not take text_encoder.")
    shutil.rmtree(random_encoder / "unet")
    with pytest.raises(OSError, match="config.json"):
        open_plainly.open_base(random_encoder)


@pytest.mark.slow
def test_it_is_opened_by_a_fresh_process(random_encoder, tiny_sd):
    verify.require_opens_plainly(tiny_sd)
    with pytest.raises(UserError, match=r"plain diffusers cannot open .*not take text_encoder\..* from model.safetensors"):
        verify.require_opens_plainly(random_encoder)


@pytest.mark.parametrize(
    "fault", ["a tensor is renamed", *(pytest.param(f, marks=pytest.mark.slow) for f in ("the scale is elsewhere", ""))]
)
def test_a_lora_that_plain_diffusers_would_not_take_whole_is_told(tiny_sdxl, tmp_path, fault):
    model = load_model(str(tiny_sdxl), device="cpu", dtype="float32")
    alpha = 8.0 if fault == "the scale is elsewhere" else 0.0
    recipe = Recipe(train=Train(methods=("lora",), text_encoder=True), lora=Lora(dora=True, alpha=alpha))
    lora.attach(model, recipe)
    lora.save(model, tmp_path, recipe)
    (file,) = tmp_path.iterdir()
    tensors, header = safetensors_io.load_tensors(file), safetensors_io.read_header(file)["metadata"]
    if fault == "a tensor is renamed":
        key = next(key for key in tensors if key.startswith("text_encoder_2.") and "magnitude" in key)
        tensors[key.replace("magnitude", "size")] = tensors.pop(key)
    safetensors_io.save_tensors(file, tensors, header)
    if not fault:
        verify.require_opens_plainly(tmp_path, lora_of=tiny_sdxl)
        return
    says = r"unet scales it by 2\.0" if alpha else r"does not take text_encoder_2\..*size_vector.* from pytorch_lora_weights"
    with pytest.raises(UserError, match=f"plain diffusers cannot open what was written, so it is not kept: .*{says}"):
        verify.require_opens_plainly(tmp_path, lora_of=tiny_sdxl)


@pytest.mark.slow
@pytest.mark.parametrize("unusual", BASES)
@pytest.mark.parametrize(("method", "fuse"), [("full", False), ("lora", True), ("lora", False)])
def test_the_commands_own_check_passes_on_unusual_bases(tiny_sd, tmp_path, unusual, method, fuse):
    unusual(tiny_sd, tmp_path / "base")
    settings = [f"base={tmp_path / 'base'}", f"train.methods={method}", "train.lr=3e-2", "train.steps=3", "prior.count=0"]
    settings += ["device=cpu", "token=zqv"]
    run = personalize.train(PHOTOS, class_word="dog", settings=settings, runs=tmp_path / "runs").folder
    check = personalize.export(run, to="diffusers", fuse=fuse, settings=["draw.size=32", "draw.guidance=5.0"]).check
    assert check.to_run <= check.allowed and check.to_base >= verify.MARGIN * verify.SAME
