"""`personalize pretrain`: trains Toyland's weights from nothing, in stages that each resume where they were stopped.

The base is a small latent diffusion model (Rombach et al. 2112.10752): a VAE on the ELBO, a CLIP pair whose text tower
conditions, and a U-Net on the DreamBooth core's own schedule and loss. An identity encoder, which only `evaluate` uses,
and the probes that read an image are trained beside it.
"""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from personalize.common.errors import UserError, nearest
from personalize.common.files import read_json, write_json
from personalize.common.settings import parse_value, setting, settings_of, validated
from personalize.common.terminal import SILENT, Terminal

STAGES = ("world", "vae", "clip", "identity", "unet", "probes")
PREDICTIONS = ("v_prediction", "epsilon", "sample")
BETAS = ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid-abar")  # of core/schedule.py, which needs torch
SECONDS = "seconds.json"  # in the work folder: stage -> seconds so far


@dataclass(frozen=True)
class Pretrain:
    """How long each stage is; the defaults are the preset for 2 CPU cores."""

    size: int = setting(64, "px of an image: 64 or 128", choices=(64, 128))
    pictures: int = setting(60_000, "scenes drawn")
    subjects: int = setting(8_000, "subjects drawn for the identity encoder")
    vae_steps: int = setting(4_000, "steps of 16 images")
    clip_steps: int = setting(1_300, "steps of 128 images with captions")
    identity_steps: int = setting(2_400, "steps of 64 pairs")
    guide_steps: int = setting(1_500, "steps of 64 latents before the U-Net's EMA guides it; 0 for no guide", least=0)
    guide_scale: float = setting(0.3, "of what the guide gets wrong, in the U-Net's target", least=0, most=0.9)
    unet_steps: int = setting(3_000, "steps of 64 latents after that")
    probe_pictures: int = setting(40_000, "scenes drawn for the probes")
    probe_steps: int = setting(3_000, "steps of 64 images")
    times: int = setting(1, "factor of every batch but the identity encoder's")
    betas: str = setting("scaled_linear", "noise schedule: a row of core/schedule.py's BETAS", choices=BETAS)
    prediction: str = setting("v_prediction", "what the U-Net predicts", choices=PREDICTIONS)
    subject_weight: float = setting(4.0, "by how much more than the backdrop the subject counts; its accessory thrice")
    min_snr: float = setting(0.0, "gamma of min-SNR weights; 0 for none")
    ema: float = setting(0.999, "decay of the U-Net's EMA")
    seed: int = setting(0, "seed of all randomness")


PRESETS = {
    "cpu": Pretrain(),
    "gpu": Pretrain(
        size=128, pictures=200_000, subjects=30_000, vae_steps=6_000, clip_steps=3_000, identity_steps=3_000,
        guide_steps=2_000, unet_steps=7_000, probe_pictures=60_000, probe_steps=4_000, times=4,
    ),
}  # fmt: skip


def pretrain(
    out: Path,
    *,
    work: Path = Path("pretraining"),
    preset: str = "cpu",
    settings: Sequence[str] = (),
    until: str = "",
    part: str = "",
    screen: Terminal = SILENT,
) -> Path | None:
    """Every stage in order, or those up to `until`; what `work` already holds is kept.

    settings: "key=value" texts that change the preset. part: instead of a base, one of `parts.PARTS`, trained onto the base
    that lies in `out`, and written into its folder there, which is returned. Else returns `out`, a diffusers folder plus
    encoders/ and probes/, or None where it stopped before that. UserError for an unknown preset, setting, stage or part, and
    where `work` was begun with other settings.
    """
    if part:
        return _pretrain_part(part, Path(out), Path(work), settings, screen)
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{nearest(preset, PRESETS) or '.'} Known: {', '.join(PRESETS)}.")
    resolved = _changed(PRESETS[preset], settings)
    if until not in ("", *STAGES):
        raise UserError(f"unknown stage {until!r}{nearest(until, STAGES) or '.'} Known: {', '.join(STAGES)}.")
    import torch

    from personalize.models import devices, lazy_imports
    from personalize.toyland.pretraining.pipeline import VAE_USAGE, run_stages

    lazy_imports.quiet_libraries()
    work, out = Path(work), Path(out)
    work.mkdir(parents=True, exist_ok=True)
    _check_work_folder(work / "settings.json", resolved)
    device = devices.choose_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(resolved.seed)
    remaining = run_stages(work, out, resolved, device, screen.say)
    for stage in STAGES:
        with _timed(work, stage):
            assert next(remaining) == stage
        if stage == until != STAGES[-1]:
            return None
    next(remaining, None)  # the export
    vae = {"preset": preset, "vae": read_json(work / VAE_USAGE)}
    write_json(out / "pretraining.json", vae | _manifest(work, resolved, device))
    return out


def _pretrain_part(name: str, base: Path, work: Path, texts: Sequence[str], screen: Terminal) -> Path:
    """Trains one of `PARTS` and returns its folder in `base`."""
    import importlib

    from personalize.toyland.pretraining.parts import PARTS

    if name not in PARTS:
        raise UserError(f"unknown part {name!r}{nearest(name, PARTS) or '.'} Known: {', '.join(PARTS)}.")
    from personalize.commands.session import open_base, resolve

    folder = base / PARTS[name]
    module = importlib.import_module(f"personalize.toyland.pretraining.{name.replace('-', '_')}")
    settings = _changed(module.Settings(), texts)
    work = work / name
    work.mkdir(parents=True, exist_ok=True)
    _check_work_folder(work / "settings.json", settings)
    model = open_base(resolve(None, [f"base={base}"]), screen)
    with _timed(work, name):
        module.train(model, folder, work, settings, screen.say)
    write_json(folder / "pretraining.json", _manifest(work, settings, model.device))
    return folder


def _changed(settings, texts: Sequence[str]):
    """Settings changed by "key=value" texts. UserError for an unknown key or value."""
    known = {s.key: s for s in settings_of(type(settings))}
    values = asdict(settings)
    for text in texts:
        key, _, value = text.partition("=")
        if key not in known:
            raise UserError(f"unknown setting {key!r}{nearest(key, known) or '.'} Known: {', '.join(known)}.")
        values[key] = validated(known[key], parse_value(value, known[key].kind), "--set")
    return type(settings)(**values)


def _check_work_folder(path: Path, settings) -> None:
    """Remembers the settings of a work folder, or refuses others."""
    if not path.exists():
        write_json(path, asdict(settings))
        return
    before, now = read_json(path), asdict(settings)
    changes = [f"{name} was {before.get(name)} and is {now[name]}" for name in now if before.get(name) != now[name]]
    if changes:
        problem = f"{path.parent} was begun with other settings: {', '.join(changes)}"
        raise UserError(f"{problem}. Take them again, or another --work.")


@contextmanager
def _timed(work: Path, stage: str) -> Iterator[None]:
    """Adds the seconds of a stage to what earlier calls took, a stopped one too."""
    path, began = work / SECONDS, time.monotonic()
    try:
        yield
    finally:
        known = read_json(path) if path.exists() else {}
        write_json(path, known | {stage: round(known.get(stage, 0) + time.monotonic() - began, 1)})


def _manifest(work: Path, settings, device) -> dict:
    """What weights came from: settings and seed, seconds by stage, machine, commit."""
    import torch

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    command, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""  # empty where it is installed
    with suppress(OSError, subprocess.TimeoutExpired):
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    manifest = {"settings": asdict(settings), "seconds": read_json(work / SECONDS), "machine": name}
    return manifest | {"commit": commit, "torch": torch.__version__}
