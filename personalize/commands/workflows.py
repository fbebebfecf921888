"""Several commands in a row: quickstart, and DreamBench over a folder of subjects."""

from collections.abc import Sequence
from pathlib import Path

from personalize.commands.compare import CompareResult, subject_table
from personalize.commands.evaluate import EvaluateResult, evaluate
from personalize.commands.generate import generate
from personalize.commands.many import many
from personalize.commands.session import PRIORS, RUNS
from personalize.commands.train import train
from personalize.common import prompts
from personalize.common.errors import UserError
from personalize.common.terminal import SILENT, Terminal
from personalize.toyland.world.examples import write_examples

EXAMPLES = Path("data_examples")


def quickstart(
    photos: Path | str = EXAMPLES / "dog",
    *,
    class_word: str = "dog",
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    screen: Terminal = SILENT,
) -> EvaluateResult:
    """Class images and training, images, scores, in a row. Without the example photos, Toyland draws them."""
    if Path(photos) == EXAMPLES / "dog" and not Path(photos).exists():
        write_examples(EXAMPLES)
        screen.say(f"drew the example photos into {EXAMPLES}")
    common = {"settings": settings, "screen": screen}
    run = train(photos, class_word=class_word, recipe=recipe, runs=runs, priors=priors, **common).folder
    images = generate(prompts.TOYLAND, run=run, **common)
    screen.say(f"images: {images.grid}")
    return evaluate(run, **common)


def dreambench(
    source: str,
    *,
    recipe: Path | str | None = None,
    settings: Sequence[str] = (),
    runs: Path = RUNS,
    priors: Path = PRIORS,
    photos: bool = True,
    screen: Terminal = SILENT,
) -> CompareResult:
    """Trains and evaluates every subject of a folder of folders, or of hf:google/dreambooth: a row each, and their mean.

    A folder's class word is in its subject.toml. What is there already is not made again.
    """
    options = {"recipe": recipe, "settings": settings, "runs": runs, "priors": priors, "screen": screen}
    rows = many(source, retry_failed=True, **options).rows
    if failed := [f"{row['id']}: {row['error']}" for row in rows if row["status"] == "failed"]:
        raise UserError(
            f"{len(failed)} of {len(rows)} subjects failed, so there is no mean over all ({failed[0]}). Mend or remove them; "
            "the others are not trained again."
        )
    evaluations = {}
    for row in rows:
        screen.say(f"evaluating {row['id']}")
        evaluations[row["id"]] = evaluate(row["run"], photos=photos, settings=settings, screen=screen).report.parent
    return subject_table(evaluations, out=Path(runs))
