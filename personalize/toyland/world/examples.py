"""The example subjects: ordinary image files, drawn from seeds that pretraining never uses."""

from pathlib import Path

from personalize.common.files import write_text, writing
from personalize.toyland.world import scenes
from personalize.toyland.world.render import draw_scene
from personalize.toyland.world.scenes import HELD_OUT, sample_subject

# folder -> (class word, seed of the subject); five photos each, seeds just above the subject's
SUBJECTS = {
    "dog": ("dog", HELD_OUT + 1_001_600),
    "cat": ("cat", HELD_OUT + 1_004_100),
    "teapot": ("teapot", HELD_OUT + 1_004_800),
}
PLACES = ("meadow", "beach", "room", "mountains", "snow")


def write_examples(root: Path) -> None:
    """Five photos and a subject.toml for each subject, in `root`/dog and so on."""
    for name, (word, seed) in SUBJECTS.items():
        subject = sample_subject(seed, word)
        (root / name).mkdir(parents=True, exist_ok=True)
        for k, place in enumerate(PLACES):
            scene = scenes.sample_scene(seed + k, subject=subject, place=place, action="standing", accessory=None)
            with writing(root / name / f"{k:02d}.png") as temporary:
                draw_scene(scene)[0].save(temporary)
        lines = (
            f'class = "{word}"',
            f'source = "drawn by personalize/toyland/examples.py, subject seed {seed}"',
            'licence = "CC0-1.0"',
        )
        write_text(root / name / "subject.toml", "\n".join(lines) + "\n")
