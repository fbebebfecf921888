"""Where a base is: by name, in the hub's cache, in a folder, in one file that is unpacked once; and what identifies it."""

import json
import os
import shutil
from pathlib import Path

import bases
import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize import models
from personalize.common.errors import UserError
from personalize.models import locate

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def ignore(line):
    pass


@pytest.fixture
def copy(tiny_sd, tmp_path):
    """A copy of the tiny base to change."""
    return shutil.copytree(tiny_sd, tmp_path / "base")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONALIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def single(tiny_sd, tmp_path):
    (tmp_path / "files").mkdir()
    return bases.single(bases.packable(tiny_sd, tmp_path / "packable"), tmp_path / "files" / "dreamy v2.safetensors")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(base, match):
    with pytest.raises(UserError, match=match):
        models.load_model(str(base), device="cpu", say=ignore)


@pytest.mark.parametrize(
    ("base", "match"),
    [
        ("toylnad", "did you mean 'toyland'"),
        ("no/such/folder", "is no diffusers folder"),
        ("model.ckpt", "is a pickle, which can run code"),
        ("model.safetensors", "is not there"),
    ],
)
def test_a_name_that_cannot_be_a_base_is_refused_with_a_word_of_why(base, match):
    refused(base, match)


def test_a_hub_id_that_is_not_here_says_that_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("nobody/nothing", "'nobody/nothing' is neither a folder here nor.*HF_HUB_OFFLINE is set.*--base toyland")


def test_only_what_is_read_is_downloaded(tmp_path, monkeypatch):
    """Not the safety checker, other programs' copies of the weights, or half-precision copies beside whole ones."""
    import fnmatch

    files = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer_2/merges.txt",
        "text_encoder_2/model-00001-of-00002.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors", "v1-5-pruned.safetensors", "vae_decoder/model.onnx", "README.md",
    ]  # fmt: skip
    asked = []

    def snapshot(base, *, allow_patterns, ignore_patterns):
        def some(name, patterns):
            return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

        asked.append([name for name in files if some(name, allow_patterns) and not some(name, ignore_patterns)])
        for name in asked[-1]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert locate.locate_base("owner/name") == tmp_path
    assert asked == [files[:5]]
    files.remove("unet/diffusion_pytorch_model.safetensors")
    shutil.rmtree(tmp_path / "unet")
    locate.locate_base("owner/name")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked[-1] and len(asked) == 3, "the only weights there are"


def test_the_size_of_a_base_on_the_hub_is_read_from_two_configs(tmp_path, monkeypatch, tiny_sd):
    def snapshot(base, *, allow_patterns, ignore_patterns):
        assert base == "owner/name" and set(allow_patterns) == {"model_index.json", "unet/config.json", "vae/config.json"}
        for name in allow_patterns:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(tiny_sd / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert locate.base_size("owner/name") == models.load_model(str(tiny_sd), device="cpu", say=ignore).size == 32


def test_half_precision_copies_are_read_where_there_is_nothing_else(copy, tiny_sd):
    whole = models.load_model(str(tiny_sd), device="cpu", say=ignore)
    for part, stem in PARTS.items():
        path = copy / part / f"{stem}.safetensors"
        half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(half, copy / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
    assert models.fingerprint(copy) == models.fingerprint(tiny_sd), "a copy beside the weights is not another base"
    for part, stem in PARTS.items():
        (copy / part / f"{stem}.safetensors").unlink()
    assert models.fingerprint(copy) != models.fingerprint(tiny_sd)
    model = models.load_model(str(copy), device="cpu", say=ignore)
    for p, q in zip(model.unet.parameters(), whole.unet.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q.half().float())


def test_the_fingerprint_changes_with_one_weight_and_with_a_config_but_not_with_the_folder(copy, tiny_sd):
    first = models.fingerprint(tiny_sd)
    assert models.fingerprint(copy) == first and len(first) == 12
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights[sorted(weights)[0]].flatten()[0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    second = models.fingerprint(copy)
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert len({first, second, models.fingerprint(copy)}) == 3


def test_a_fingerprint_sees_every_part_of_a_large_file(tmp_path, monkeypatch):
    """Nothing larger than 1/32 of a file can change unseen."""
    monkeypatch.setattr(locate, "SAMPLE", 1 << 10)
    (tmp_path / "unet").mkdir()
    path, edge = tmp_path / "unet" / "diffusion_pytorch_model.safetensors", 1 << 14
    path.write_bytes(bytes(32 * edge))
    seen = {models.fingerprint(tmp_path)}
    for k in range(32):
        path.write_bytes(bytes(k * edge) + bytes([1]) * edge + bytes((31 - k) * edge))
        seen.add(models.fingerprint(tmp_path))
    assert len(seen) == 33


def test_a_single_file_is_unpacked_once_and_says_so(single, cache, tiny_sd):
    said = []
    first = locate.locate_base(str(single), said.append)
    assert first.parent == cache / "bases" and first.name.startswith("dreamy v2-")
    assert [line.split(":")[0] for line in said] == [
        f"turning dreamy v2.safetensors ({single.stat().st_size / 1e9:.2f} GB) into a diffusers folder, this once",
        "dreamy v2.safetensors is taken for a StableDiffusionPipeline of epsilon prediction, which the file does not say",
    ]
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert locate.locate_base(str(single), said.append) == first and len(said) == 2
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert os.listdir(cache / "bases") == [first.name], "nothing temporary is left"


def test_a_single_file_is_the_base_it_was_written_from(single, tiny_sd):
    file, folder = (models.load_model(str(base), device="cpu", say=ignore) for base in (single, tiny_sd))
    assert file.name == str(single) and file.folder != single
    for name, module in folder.networks.items():
        for (key, p), (other, q) in zip(module.state_dict().items(), file.networks[name].state_dict().items(), strict=True):
            assert key == other and torch.equal(p.half().float(), q), key


def test_a_changed_file_is_another_base_and_a_moved_one_the_same(single, tmp_path):
    first = locate.locate_base(str(single), ignore)
    moved = shutil.copytree(single.parent, tmp_path / "elsewhere") / single.name
    assert locate.locate_base(str(moved), ignore) == first
    weights = load_file(single)
    weights[sorted(weights)[0]].flatten()[0] += 1
    save_file(weights, single)
    assert locate.locate_base(str(single), ignore) != first


def test_a_file_that_cannot_be_unpacked_leaves_nothing_behind(single, cache):
    single.write_bytes(single.read_bytes()[:-100])
    refused(single, "dreamy v2.safetensors")
    assert not list((cache / "bases").rglob("*"))


def test_leftovers_of_a_killed_unpacking_are_removed(single, cache):
    from personalize.common.files import slug

    left = cache / "bases" / f".tmp-{slug(os.uname().nodename)[:24]}-999999999-abcdef-x"
    left.mkdir(parents=True)
    locate.locate_base(str(single), ignore)
    assert not left.exists()


def test_a_folder_that_another_process_unpacked_meanwhile_is_kept(single, monkeypatch):
    """It may be reading from it."""
    from personalize.formats import single_file

    to_folder, made = single_file.unpack_single_file, []

    def slow(path, folder, **more):
        to_folder(path, folder, **more)
        if not made:
            made.append(path)
            (locate.locate_base(str(path), ignore) / "mark").touch()

    monkeypatch.setattr(single_file, "unpack_single_file", slow)
    assert (locate.locate_base(str(single), ignore) / "mark").exists()


def test_the_disk_is_looked_at_before(single, monkeypatch):
    usage = type("Usage", (), {"free": single.stat().st_size})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    refused(single, "GB are free there")


def test_a_cache_that_cannot_be_written_is_the_users_error(single, monkeypatch):
    monkeypatch.setenv("PERSONALIZE_CACHE", str(single))
    refused(single, "cannot write .*Set PERSONALIZE_CACHE to a folder")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PERSONALIZE_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/personalize"),
        ({"PERSONALIZE_CACHE": "", "XDG_CACHE_HOME": ""}, "~/.cache/personalize"),
        ({"PERSONALIZE_CACHE": "~/mine"}, "~/mine"),
    ],
)
def test_the_cache_is_where_the_user_says(monkeypatch, variables, expected):
    for name in ("PERSONALIZE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert locate.cache_folder() == Path(expected).expanduser()
