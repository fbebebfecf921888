"""What a recipe says of a base against its files: its prediction, zero terminal SNR, its VAE; and what a file's U-Net
predicts, by trying it.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from personalize.common.bases import folder_of
from personalize.common.errors import UserError
from personalize.common.files import key_of, read_json, slug, writing
from personalize.formats import single_file
from personalize.models.base_vae import digest_of_vae, write_vae
from personalize.models.config_schema import INDEX, SCHEDULER
from personalize.models.locate import MadeMeanwhile, cache_folder, fingerprint, make_cache, public_name
from personalize.models.prediction import fitting_prediction

CONFIGS = ("config.json", "scheduler_config.json")
INDEX_FILE = "model_index.json"
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # of Lin et al. 2305.08891 sections 3.1 and 3.3
# diffusers' schedulers that rescale betas; for another one DDIM does, which reads the same config
RESCALING = ("DDIM", "DDPM", "DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "LCM", "TCD", "UniPCMultistep")


def folder_with_settings(
    folder: Path, base: str, say: Callable[[str], None], *, prediction: str, base_vae: str, zero_snr: bool = False
) -> Path:
    """The folder of a base with these settings: in the user's cache, linked to its own, or its own where it is so.

    UserError for zero terminal SNR of a base that predicts eps.
    """
    configs = _predicting(folder, base, prediction, say)
    rescaled = _rescaled(folder, base, configs, say) if zero_snr else {}
    configs |= rescaled
    vae = digest_of_vae(base_vae) if base_vae else ""
    if not configs and not vae:
        return folder
    place = os.path.abspath(folder)
    key = {"base": fingerprint(folder), "place": place, "prediction": prediction if configs else "", "vae": vae}
    key = key_of(key | ({"zero_snr": True} if rescaled else {}))
    if vae:
        configs.pop("vae", None)
    made = cache_folder() / "bases" / f"{slug(Path(base).stem)}-{key}"
    if made.is_dir():
        return made
    make_cache(made.parent)
    with suppress(MadeMeanwhile), writing(made) as temporary:
        temporary.mkdir()
        for entry in sorted(Path(place).iterdir()):
            if entry.name == INDEX_FILE and rescaled:
                _write_index(entry, temporary / INDEX_FILE, rescaled["scheduler"]["_class_name"])
            elif entry.name in configs:
                _link_all_but(entry, temporary / entry.name, CONFIGS)
            elif entry.name != "vae" or not vae:
                (temporary / entry.name).symlink_to(entry)
        _write_configs(temporary, configs)
        if vae:
            write_vae(base_vae, folder, temporary / "vae", say)
        if made.is_dir():
            raise MadeMeanwhile
    return made


def _predicting(folder: Path, base: str, prediction: str, say: Callable[[str], None]) -> dict[str, dict]:
    """{part: config} of a base that predicts this where its files say something else, else {}."""
    config = read_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    stated = config.get("prediction_type", "epsilon")
    if prediction in ("", stated):
        return {}
    say(f"prediction = {prediction!r} is used for {public_name(base)}; its files say, or are taken for, {stated!r}")
    if folder_of(base).is_file():
        return single_file.predicting(folder, prediction)
    return {"scheduler": config | {"prediction_type": prediction}}


def _rescaled(folder: Path, base: str, configs: dict[str, dict], say: Callable[[str], None]) -> dict[str, dict]:
    """{"scheduler": config} with zero terminal SNR, for training and drawing alike; {} where the base has it."""
    config = configs.get("scheduler") or read_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    if config.get("rescale_betas_zero_snr"):
        return {}
    if config.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            f"zero_snr = true: base {public_name(base)!r} predicts epsilon, and of pure noise the noise says nothing. Set "
            "zero_snr=false, or prediction=v_prediction for a base that was trained so."
        )
    say(f"zero_snr = true: the noise schedule of {public_name(base)} ends in pure noise, in training and in drawing")
    kind = config.get("_class_name", "")
    named = kind if kind.removesuffix("Scheduler") in RESCALING else "DDIMScheduler"
    return {"scheduler": config | ZERO_SNR | {"_class_name": named}}


def _write_index(source: Path, target: Path, scheduler: str) -> None:
    """The pipeline's index with this class of its scheduler, for who reads the folder of a result with diffusers."""
    index = read_json(source, INDEX)
    target.write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler]}, indent=2) + "\n")


def _write_configs(folder: Path, configs: dict[str, dict]) -> None:
    for part, config in configs.items():
        (folder / part / CONFIGS[part == "scheduler"]).write_text(json.dumps(config, indent=2) + "\n")


def _link_all_but(source: Path, target: Path, names: tuple[str, ...]) -> None:
    target.mkdir()
    for path in sorted(path for path in source.iterdir() if path.name not in names):
        (target / path.name).symlink_to(path)


def try_prediction(folder: Path, name: str) -> str:
    """Try which prediction an unpacked file's U-Net makes, and write that into its configs -> how it was told, in words."""
    from personalize import models  # which imports this

    assumed = read_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)["prediction_type"]
    try:
        found, errors = fitting_prediction(models.load_model(str(folder), say=lambda line: None))
    except UserError as error:  # the folder is a temporary one
        raise UserError(str(error).replace(str(folder), name)) from None
    if found not in ("", assumed):
        _write_configs(folder, single_file.predicting(folder, found))
    means = "by one pass of its U-Net" if found else "as its release, and one pass of its U-Net does not tell"
    shown = ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
    other = "epsilon" if (found or assumed) == "v_prediction" else "v_prediction"
    return f", which the file does not say: {means} (error of {shown}). If it is not, set prediction={other}"
