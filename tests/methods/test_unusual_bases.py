"""Whatever a base's folder looks like, a whole model that is saved from it opens with plain diffusers."""

import json
import shutil

import pytest

from personalize.commands.export import verify
from personalize.common.errors import UserError
from personalize.common.recipe import Recipe, Train
from personalize.formats import safetensors_io
from personalize.methods import full
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
    assert verify.open_plainly(folder) == ""
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
    assert verify.open_plainly(random_encoder).startswith("it does not take text_encoder.")
    shutil.rmtree(random_encoder / "unet")
    with pytest.raises(OSError, match="config.json"):
        verify.open_plainly(random_encoder)


@pytest.mark.slow
def test_it_is_opened_by_a_fresh_process(random_encoder, tiny_sd):
    verify.require_opens_plainly(tiny_sd)
    with pytest.raises(UserError, match=r"plain diffusers cannot open .*not take text_encoder\..* from model.safetensors"):
        verify.require_opens_plainly(random_encoder)
