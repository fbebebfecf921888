"""What a base's files do not say: the prediction, by a setting or by one pass; a VAE, given in a file or a folder."""

import json
import os
import shutil

import bases
import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize import models
from personalize.commands import generate as generate_command
from personalize.common.errors import UserError
from personalize.formats.ldm import vae_names
from personalize.models import base_settings, prediction
from personalize.models.base_vae import write_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("own_cache")


def ignore(line):
    pass


@pytest.fixture(scope="module")
def single(tiny_sd, tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    return bases.single(bases.packable(tiny_sd, place / "packable"), place / "dreamy.safetensors")


@pytest.fixture
def fresh(single, tmp_path, monkeypatch):
    """The single file where nothing is unpacked yet, to change."""
    monkeypatch.setenv("PERSONALIZE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(single.parent / "tokenizer", tmp_path / "tokenizer")
    return shutil.copy(single, tmp_path / "dreamy.safetensors")


@pytest.fixture(scope="module")
def whole(single):
    return load(single)


@pytest.fixture(scope="module")
def without_vae(single):
    """The single file's VAE, in a file of its own with the original names, and the rest of it."""
    tensors = load_file(single)
    prefix = "first_stage_model."
    vae, rest = single.with_name("vae.safetensors"), single.parent / "rest.safetensors"
    save_file({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}, vae)
    save_file({key: value for key, value in tensors.items() if not key.startswith(prefix)}, rest)
    return rest, vae


def load(base, **settings):
    return models.load_model(str(base), device="cpu", dtype="float32", say=settings.pop("say", ignore), **settings)


def decoded(model):
    return model.decode_latents(torch.linspace(-2, 2, 4 * 8 * 8).reshape(1, 4, 8, 8))


@pytest.fixture(scope="module")
def toyland():
    return models.load_model("toyland", device="cpu", dtype="float32", say=ignore)


def predicting(model, monkeypatch, kind):
    """Toyland, which predicts v, with its output turned into what a network of equal knowledge would say."""
    own = model.predict
    assert model.schedule.prediction == "v_prediction"

    def predict(z_t, t, cond):
        alpha, sigma = model.schedule.coefficients(t, z_t)
        v = own(z_t, t, cond)
        return {"epsilon": sigma * z_t + alpha * v, "v_prediction": v, "nothing": torch.zeros_like(v)}[kind]

    monkeypatch.setattr(model, "predict", predict)
    return prediction.fitting_prediction(model)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_pass_tells_what_a_trained_network_predicts(toyland, monkeypatch, kind):
    found, errors = predicting(toyland, monkeypatch, kind)
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[kind]
    assert found == kind and errors[other] > 1.7 * errors[kind]


def test_one_pass_does_not_tell_what_a_network_without_training_predicts(toyland, monkeypatch, tiny_sd, tiny_sdxl):
    for base in (tiny_sd, tiny_sdxl):
        assert prediction.fitting_prediction(load(base))[0] == ""
    found, errors = predicting(toyland, monkeypatch, "nothing")
    assert not found and errors == pytest.approx({"epsilon": 1, "v_prediction": 1})


def test_the_pass_decides_for_a_file_that_does_not_say_and_is_asked_by_no_other(fresh, monkeypatch):
    single = fresh
    asked = []
    monkeypatch.setattr(
        base_settings,
        "fitting_prediction",
        lambda m: asked.append(m) or ("v_prediction", {"epsilon": 1.1, "v_prediction": 0.4}),
    )
    said = []
    model = load(single, say=said.append)
    assert model.schedule.prediction == "v_prediction" and len(asked) == 1
    assert "of v_prediction prediction, which the file does not say: by one pass" in said[1]
    assert "(error of epsilon 1.10, v_prediction 0.40). If it is not, set prediction=epsilon" in said[1]
    assert load(single).schedule.prediction == "v_prediction" and len(asked) == 1, "unpacked once, asked once"
    single.with_suffix(".yaml").write_text("    parameterization: eps\n")
    assert load(single).schedule.prediction == "epsilon"
    single.with_suffix(".yaml").unlink()
    save_file(load_file(single), single, metadata={"modelspec.prediction_type": "epsilon"})
    assert load(single).schedule.prediction == "epsilon" and len(asked) == 1


def test_where_the_pass_does_not_tell_the_release_does(fresh):
    said = []
    assert load(fresh, say=said.append).schedule.prediction == "epsilon"
    assert "epsilon prediction, which the file does not say: as its release, and one pass of its U-Net does not tell" in said[1]
    assert said[1].endswith("If it is not, set prediction=v_prediction")


@pytest.mark.parametrize("source", ["folder", "file"])
def test_the_setting_wins_over_the_files_and_makes_another_base(request, source):
    base = str(request.getfixturevalue({"folder": "tiny_sd", "file": "single"}[source]))
    plain, said = models.locate_base(base, ignore), []
    assert models.locate_base(base, said.append, prediction="epsilon") == plain and not said, "as the files say already"
    other = load(base, prediction="v_prediction", say=said.append)
    assert other.schedule.prediction == "v_prediction" and other.name == base
    assert len(said) == 1 and "prediction = 'v_prediction' is used" in said[0] and "'epsilon'" in said[0]
    assert other.fingerprint == models.fingerprint(other.folder) != models.fingerprint(plain)
    assert models.locate_base(base, ignore, prediction="v_prediction") == other.folder
    unets = [folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in (other.folder, plain)]
    assert unets[0].samefile(unets[1]), "linked, not copied"


def test_a_setting_for_sd2_brings_its_size(tmp_path):
    (tmp_path / "files").mkdir()
    single = bases.single(bases.sd2(tmp_path / "sd2"), tmp_path / "files" / "two.safetensors")
    for prediction_type, cells in (("", 96), ("epsilon", 64)):
        folder = models.locate_base(str(single), ignore, prediction=prediction_type)
        configs = [json.loads((folder / part).read_text()) for part in ("scheduler/scheduler_config.json", "unet/config.json")]
        assert configs[0]["prediction_type"] == (prediction_type or "v_prediction")
        assert configs[1]["sample_size"] == cells and models.fingerprint(folder)


def test_zero_terminal_snr_is_another_base_whose_schedule_is_diffusers_rescaled_one(tiny_sd):
    plain, said, v = models.locate_base(str(tiny_sd), ignore), [], {"prediction": "v_prediction"}
    other = load(tiny_sd, zero_snr=True, say=said.append, **v)
    assert "the noise schedule of" in said[-1] and other.schedule.spacing == "trailing"
    config = json.loads((other.folder / "scheduler" / "scheduler_config.json").read_text())
    index = json.loads((other.folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", config["_class_name"]]
    theirs = getattr(diffusers, config["_class_name"]).from_pretrained(other.folder / "scheduler")
    assert theirs.config.rescale_betas_zero_snr and other.schedule.alphas_cumprod[-1] == 0
    torch.testing.assert_close(other.schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=2e-7)
    ordinary = load(tiny_sd, **v)
    assert len({models.fingerprint(plain), ordinary.fingerprint, other.fingerprint}) == 3
    assert float(ordinary.schedule.alphas_cumprod[-1]) > 0
    assert models.locate_base(str(tiny_sd), ignore, zero_snr=True, **v) == other.folder


def test_zero_terminal_snr_is_refused_for_epsilon_and_changes_nothing_where_it_is(tiny_sd):
    with pytest.raises(
        UserError, match="zero_snr = true: base .* predicts epsilon.*zero_snr=false, or prediction=v_prediction"
    ):
        models.locate_base(str(tiny_sd), ignore, zero_snr=True)
    assert models.locate_base("toyland", ignore, zero_snr=True) == models.locate_base("toyland", ignore)


def test_a_scheduler_that_does_not_rescale_becomes_ddim(tmp_path, tiny_sd):
    folder = shutil.copytree(tiny_sd, tmp_path / "pndm")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "PNDMScheduler"}))
    made = models.locate_base(str(folder), ignore, zero_snr=True, prediction="v_prediction")
    assert json.loads((made / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_a_checkpoint_without_a_vae_is_refused_with_the_remedy(without_vae):
    rest, _ = without_vae
    with pytest.raises(UserError, match="rest.safetensors is a checkpoint without a VAE .*--set base_vae=FILE"):
        load(rest)


def test_a_checkpoint_without_a_vae_is_the_whole_one_with_it(without_vae, whole):
    rest, vae = without_vae
    given = load(rest, base_vae=str(vae))
    assert torch.equal(decoded(given), decoded(whole)) and given.fingerprint == whole.fingerprint
    with pytest.raises(UserError, match="without a VAE"):
        models.locate_base(str(rest), ignore)


@pytest.mark.parametrize("form", ["original names", "diffusers' names", "checkpoint", "folder", "base"])
def test_a_vae_is_read_in_every_form(without_vae, single, whole, tmp_path, form):
    place = whole.folder / "vae"
    tensors, config = load_file(place / WEIGHTS), json.loads((place / "config.json").read_text())
    if form == "diffusers' names":
        assert set(tensors) == set(vae_names(config))
        save_file(tensors, tmp_path / "named.safetensors")
    places = {"checkpoint": single, "folder": place, "base": whole.folder, "original names": without_vae[1]}
    write_vae(str(places.get(form, tmp_path / "named.safetensors")), whole.folder, tmp_path / "vae", ignore)
    written = load_file(tmp_path / "vae" / WEIGHTS)
    assert written.keys() == tensors.keys() and all(torch.equal(written[key], tensors[key]) for key in tensors)
    assert json.loads((tmp_path / "vae" / "config.json").read_text()) == config


def test_a_given_vae_takes_the_place_of_any_bases(tiny_sd, without_vae, tmp_path):
    _, file = without_vae
    tensors = load_file(file)
    changed = {key: value * 2 if key == "decoder.conv_out.weight" else value for key, value in tensors.items()}
    save_file(changed, tmp_path / "mse.safetensors")
    plain = load(tiny_sd)
    other, again = (load(tiny_sd, base_vae=str(tmp_path / "mse.safetensors")) for _ in range(2))
    assert other.fingerprint == again.fingerprint != plain.fingerprint
    assert torch.equal(other.vae.decoder.conv_out.weight, plain.vae.decoder.conv_out.weight.half().float() * 2)
    assert other.vae.config.norm_num_groups == plain.vae.config.norm_num_groups == 4, "what the file does not say is the base's"
    assert all(torch.equal(p, q) for p, q in zip(plain.unet.parameters(), other.unet.parameters(), strict=True))
    both = load(tiny_sd, base_vae=str(tmp_path / "mse.safetensors"), prediction="v_prediction")
    assert both.schedule.prediction == "v_prediction" and len({both.fingerprint, other.fingerprint, plain.fingerprint}) == 3


def test_what_is_no_vae_is_named_with_the_remedy(tiny_sd, tiny_sdxl, without_vae, tmp_path):
    rest, vae = without_vae
    tensors = load_file(vae)
    torn = {key: value for key, value in tensors.items() if key != "encoder.conv_in.weight"}
    nan = tensors | {"encoder.conv_in.weight": tensors["encoder.conv_in.weight"] * float("nan")}
    for name, content in (("torn", torn), ("nan", nan), ("lora", {"lora_unet_x.alpha": torch.ones(())})):
        save_file(content, tmp_path / f"{name}.safetensors")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    other = shutil.copytree(tiny_sd / "vae", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    listed = shutil.copytree(tiny_sd / "vae", tmp_path / "listed")
    (listed / "config.json").write_text("[]")
    wide = shutil.copytree(tiny_sd / "vae", tmp_path / "wide")
    (wide / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    for base in (tiny_sd, rest):
        for source, match in (
            (tmp_path / "none.safetensors", "there is no such file or folder"),
            (tmp_path / "vae.ckpt", "is a pickle"),
            (tmp_path / "pipe.safetensors", "is a pipe, not a file"),
            (rest, "is not a VAE: it has .* tensors such as"),
            (tmp_path / "lora.safetensors", "is not a VAE: it has 1 tensors such as 'lora_unet_x.alpha'"),
            (tmp_path / "torn.safetensors", "encoder.conv_in.weight"),
            (tmp_path / "nan.safetensors", "not a finite number"),
            (tmp_path / "empty", "no config.json"),
            (other, "is of AutoencoderTiny, expected is AutoencoderKL"),
            (listed, "expected an object"),
            (wide, "16 latent channels where the base's U-Net takes 4"),
        ):
            with pytest.raises(UserError, match=match) as error:
                models.locate_base(str(base), ignore, base_vae=str(source))
            assert str(source) in str(error.value)
            if "pickle" not in match and "pipe" not in match:
                assert "Give a VAE of Stable Diffusion for base_vae" in str(error.value)


def test_a_vae_of_another_scale_is_noticed(tiny_sd, tiny_sdxl):
    said = []
    models.locate_base(str(tiny_sdxl), said.append, base_vae=str(tiny_sd))
    assert any("scales latents by 0.18215 and the base by 0.13025" in line for line in said)


def test_generate_takes_both_settings(without_vae, single, tmp_path):
    rest, vae = without_vae
    settings = ["draw.steps=2", "draw.count=1", "draw.sampler=ddim", "draw.size=64", "device=cpu"]
    rows = []
    for base, more in ((single, []), (rest, [f"base_vae={vae}"]), (rest, [f"base_vae={vae}", "prediction=v_prediction"])):
        out = tmp_path / f"out{len(rows)}"
        result = generate_command.generate(["a dog"], base=str(base), settings=[*settings, *more], out=out)
        row = json.loads((out / "images.jsonl").read_text())
        rows.append((result.files[0].read_bytes()[-500:], row["fingerprint"]))
    assert rows[0] == rows[1] and rows[2][1] != rows[0][1]
