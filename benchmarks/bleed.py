"""Do the words of a run of several subjects stay apart?    python -m benchmarks.bleed WORK [--cases CASE …] [--sets SET …]

Runs of two and three Toyland subjects of one class, by `personalize train` with the settings of a case, evaluated on Toyland's
test prompts, an image each. A row is a run; one that is there is not trained again:

bleed      largest and mean share of the way to another subject's photos, by DINO, and the mean by truth (`evaluation.bleed`)
identity   mean share of the way to a subject's own photos, by DINO, and by truth
adherence  images with what their prompt asks for (place, action, accessory), over the base's
seconds    of training
"""

import argparse
import statistics
from pathlib import Path

import personalize
from benchmarks.subjects import ADHERENCE, render_photos
from personalize.commands.compare import read_rows
from personalize.common.files import write_text
from personalize.common.run_folder import read_manifest
from personalize.evaluation import summary
from personalize.toyland.world.scenes import HELD_OUT

FIRST = HELD_OUT + 9_800_000  # seeds that no other part of the project uses
SETS = {  # numbers of the dogs
    "two dogs, a": (0, 1),
    "two dogs, b": (2, 3),
    "three dogs, a": (0, 1, 2),
    "three dogs, b": (3, 4, 5),
}
HASTY = ("train.lr=8e-4", "prior.count=0", "train.steps=120")  # four times the rate, and no class images
FROZEN = (*HASTY, "train.text_encoder=false")
CASES = {
    "full": (),
    "lora": ("train.methods=lora",),
    "textual inversion": ("train.methods=textual-inversion",),
    "custom diffusion": ("train.methods=custom-diffusion",),
    "full, cut-mix": ("train.cut_mix=0.25",),
    "hasty": HASTY,
    "hasty, frozen text encoder": FROZEN,
    "hasty, frozen text encoder, cut-mix": (*FROZEN, "train.cut_mix=0.3"),
}
ALWAYS = ("choose.every=0", "train.checkpoint_every=0", "prior.count=60")
EVALUATION = ("evaluate.count=1", "evaluate.class_count=4", "draw.steps=15")
COLUMNS = ("bleed, worst", "bleed", "bleed, truth", "identity", "identity, truth", "adherence", "seconds")


def photos(work: Path, number: int) -> str:
    folder = work / "photos" / str(number)
    if not folder.exists():
        folder.mkdir(parents=True)
        for k, image in enumerate(render_photos(FIRST + 10 * number, "dog")):
            image.save(folder / f"{k:02d}.png")
    return str(folder)


def train(work: Path, numbers: tuple[int, ...], settings: tuple[str, ...], seconds_file: Path) -> Path:
    """The run; where it is there, `train` finds it finished."""
    result = personalize.train(
        [photos(work, number) for number in numbers], class_word=["dog"] * len(numbers), settings=[*ALWAYS, *settings],
        runs=work / "runs", priors=work / "priors",
    )  # fmt: skip
    if result.steps:
        write_text(seconds_file, f"{result.seconds:.0f}")
    return result.folder


def row(work: Path, run: Path, seconds: float) -> dict[str, float]:
    """What a run scores; every word is evaluated, for whether it still listens."""
    kept, base = [], []
    for subject in read_manifest(run)["subjects"]:
        result = personalize.evaluate(run, token=subject["token"], settings=EVALUATION, photos=False)
        rows = read_rows(result.report.parent)
        for values, kind in ((kept, "subject"), (base, "base")):
            values += [r[name] for r in summary.of_kind(rows, kind) for name in ADHERENCE if r[name] is not None]
    pairs = result.metrics["bleed"]["pairs"]
    own, other = ([pair for pair in pairs if (pair["word"] == pair["photos"]) is same] for same in (True, False))
    values = [max(pair["share"] for pair in other)]
    for part in (other, own):
        values += [statistics.mean(each["share"] for each in group) for group in (part, [pair["truth"] for pair in part])]
    return dict(zip(COLUMNS, [*values, statistics.mean(kept) / statistics.mean(base), seconds], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    arguments = parser.parse_args()
    print(f"| case | subjects | {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * len(COLUMNS)}")
    for case in arguments.cases:
        for name in arguments.sets:
            seconds_file = arguments.work / f"{case}-{name}.seconds"
            run = train(arguments.work, SETS[name], CASES[case], seconds_file)
            values = row(arguments.work, run, float(seconds_file.read_text()))
            cells = [f"{values[column]:.{0 if column == 'seconds' else 2}f}" for column in COLUMNS]
            print(f"| {case} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
