"""What `evaluate` hands to the report, for one Toyland dog: numbers as they come, images drawn without a model."""

import random
from pathlib import Path

import torch
from PIL import Image

from personalize.data.map_sheet import heated
from personalize.evaluation.report.page import Shown
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import HELD_OUT, sample_scene, sample_subject

DOG = Path(__file__).parents[1] / "data_examples" / "dog"
SEED = HELD_OUT + 1_001_600
SCENES = {
    "a sks dog swimming": {"action": "swimming"}, "a sks dog on the beach": {"place": "beach"},
    "a sks dog in the snow": {"place": "snow"}, "a sks dog in the city at night": {"place": "city"},
    "a sks dog jumping on a meadow": {"place": "meadow", "action": "jumping"}, "a sks dog in the desert": {"place": "desert"},
    "a sks dog wearing a red hat": {"accessory": ("hat", "red")},
    "a sks dog wearing a blue hat in a room": {"place": "room", "accessory": ("hat", "blue")},
}  # fmt: skip


def measure(title: str, score: float, floor: float, ceiling: float | None = None, **more) -> dict:
    relative = None if ceiling is None else (score - floor) / (ceiling - floor)
    return {"title": title, "score": score, "low": score - 0.03, "high": score + 0.03, "floor": floor, "ceiling": ceiling,
            "relative": relative, "better": "higher", "note": ""} | more  # fmt: skip


def checkpoint(step: int, identity: float, obeys: float, **more) -> dict:
    return {"step": step, "identity": identity, "low": identity - 0.05, "high": identity + 0.05, "obeys": obeys,
            "base_obeys": 0.613, "drift": 0.0005 * step, "qualifies": True, "failed": [], "chosen": False} | more  # fmt: skip


def evaluation(prompts: list[str] | None = None, count: int = 4) -> dict:
    r, prompts = random.Random(0), prompts or list(SCENES)
    nearest = [min(0.97, max(0.3, r.gauss(0.78, 0.07))) for _ in range(len(prompts) * count)]
    return {
        "schema": 1, "time": "2026-11-20T20:31:00Z", "seconds": {"drawing": 31.2, "metrics": 2.0}, "photos_included": True,
        "run": {"name": "sks-dog", "prompt": "a sks dog", "token": "sks", "class": "dog", "base": "toyland",
                "methods": ["full"], "steps": 400, "lr": 1e-4, "checkpoint": "step 300, chosen of 4", "seed": 0, "photos": 4},
        "protocol": {"name": "toyland", "prompts": len(prompts), "count": count, "class_count": 16, "seed": 0,
                     "sampler": "dpm++2m", "steps": 20, "guidance": 4.0, "size": 64},
        "verdict": ["It is the same subject: 81 % of the way from any dog to the photos.",
                    "It still listens: CLIP-T −0.012 against the base on the same prompts.",
                    "A dog is still any dog, almost: class images moved 25 % of the way to the photos."],
        "verdict_levels": ["good", "good", "warn"],
        "scores": {
            "dino": measure("DINO: same subject", 0.790, 0.176, 0.935),
            "dino_fg": measure("DINO-fg: same subject, background apart", 0.812, 0.231, 0.951),
            "first": measure("First among look-alikes", 0.906, 0.031, 1.0),
            "clip_i": measure("CLIP-I: same content", 0.846, 0.612, 0.921),
            "clip_t": measure("CLIP-T: follows the prompt", 0.601, 0.613),
            "diversity": measure("DIV: patch distance", 0.214, 0.355, note="between pictures of a prompt"),
            "held_out": measure("DINO on held-out photos", 0.771, 0.181, 0.935, low=None, high=None),
        },
        "class": {"prompt": "a dog", "pres": 0.359, "low": 0.31, "high": 0.41, "base": 0.164, "ceiling": 0.935, "share": 0.25,
                  "share_low": 0.19, "share_high": 0.32, "clip_t": 0.601, "base_clip_t": 0.609},
        "copying": {"nearest": nearest, "leave_one_out": [0.88, 0.9, 0.93, 0.93], "copied": 0, "pictures": len(nearest),
                    "auth_pct": 96.9, "pairs": [{"prompt": prompts[k], "index": k, "photo": k, "cosine": 0.93 - 0.01 * k}
                                                for k in range(min(3, len(prompts)))]},
        "truth": {name: {"score": s, "low": s - 0.05, "high": min(1, s + 0.04), "base": b, "count": 28}
                  for name, s, b in (("place", 0.97, 0.98), ("action", 0.91, 0.95), ("accessory", 0.83, 0.96),
                                     ("class", 1.0, 1.0), ("identity error", 0.31, 0.98))},
        "prompts": [{"prompt": p, "count": count, "dino": r.uniform(0.68, 0.86), "clip_t": r.uniform(0.55, 0.63),
                     "base_clip_t": 0.613, "diversity": r.uniform(0.1, 0.3)} for p in prompts],
        "checkpoints": [checkpoint(100, 0.41, 0.618), checkpoint(200, 0.66, 0.611),
                        checkpoint(300, 0.80, 0.601, chosen=True),
                        checkpoint(400, 0.82, 0.548, qualifies=False, failed=["obedience"])],
        "choice": "step 300: the earliest within one standard error of the best identity among 3 that keep to the limits",
        "fixed_loss": [{"step": step, "fixed_subject": 0.1 + 2 / step, "held_out": 0.14 + step / 9000, "fixed_prior": 0.11}
                       for step in range(20, 401, 20)],
        "photos": [{"file": f"{k:02d}.png", "trained": k != 4, "notes": ["all photos show it standing"] * (k == 0)}
                   for k in range(5)],
        "unusable": [{"prompt": prompts[0], "index": 3, "why": "black"}],
        "encoders": {"dino": "toyland identity, sha256:" + "3f9a" * 16, "clip": "toyland words, sha256:" + "77b0" * 16},
        "agreement": 0.913,
        "preprocessing": {"dino": "short side 64 px, centre crop", "clip": "short side 64 px, centre crop"},
        "versions": {"torch": "2.13.0", "diffusers": "0.37.0", "transformers": "5.2.0", "personalize": "0.1.0"},
        "command": "personalize evaluate runs/sks-dog",
    }  # fmt: skip


def shown(prompts: list[str] | None = None, count: int = 4, *, size: int = 64, photos: bool = True) -> Shown:
    who, prompts = sample_subject(SEED, "dog"), prompts or list(SCENES)
    scenes = list(SCENES.values())
    cells = {
        (prompt, k): _scene(500 + k, size, subject=who, **({"accessory": None} | scenes[at % len(scenes)]))
        for at, prompt in enumerate(prompts)
        for k in range(count)
    }
    cells[prompts[0], count - 1] = Image.new("RGB", (size, size))
    real = [Image.open(path).convert("RGB") for path in sorted(DOG.glob("*.png"))[:4]] if photos else []
    plain = [_scene(700 + k, size, subject=sample_subject(k, "dog"), accessory=None) for k in range(16)]
    moved = [_scene(700 + k, size, subject=who if k % 4 == 1 else sample_subject(k, "dog"), accessory=None) for k in range(16)]
    prior = [_scene(900 + k, size, subject=sample_subject(50 + k, "dog")) for k in range(12)]
    cell = torch.linspace(0, 1, 64).view(8, 8)
    maps = {
        (prompt, 0): {"sks": heated(cells[prompt, 0], cell), "dog": heated(cells[prompt, 0], cell.T)} for prompt in prompts[:4]
    }
    return Shown(real, prior, cells, plain, moved, maps)


def _scene(seed: int, size: int, **fixed) -> Image.Image:
    return draw_scene(sample_scene(HELD_OUT + seed, **fixed), size)[0]
