"""Scores in plain words: is it the same subject, does it still obey, is a dog still a dog? Thresholds are rules of thumb."""

GOOD, WARN, BAD = "good", "warn", "bad"
SAME, RELATIVE = 0.6, 0.3  # of the way from the base to the photos
LISTENS, HARDLY = 0.05, 0.12  # of the base's CLIP-T that may be lost
CLEARLY, OFTEN = 0.1, 0.3  # of the images in which a part is another's, beyond what is misread
STILL, DRIFTED = 0.25, 0.5  # of the way that class images may move to the photos, or images of a subject to another's

Line = tuple[str, str]  # level, sentence


def verdict(metrics: dict) -> list[Line]:
    """What metrics.json holds -> one sentence for each question, its level first."""
    word = metrics["run"]["class"]
    lines = [_identity(metrics["scores"]["dino"], word, parts := metrics.get("parts") or [])]
    if parts:
        lines.append(_parts(parts))
    lines.append(_adherence(metrics["scores"]["clip_t"]))
    if metrics["class"]:
        lines.append(_class(metrics["class"], word))
    if metrics.get("bleed"):
        lines.append(_bleed(metrics["bleed"]))
    if metrics["copying"] and metrics["copying"]["copied"]:
        lines.append(_copies(metrics["copying"]))
    if metrics["unusable"]:
        count, first = len(metrics["unusable"]), metrics["unusable"][0]["why"]
        is_ = f"{count} image is" if count == 1 else f"{count} images are"
        lines.append((BAD, f"{is_} unusable ({first}); scored as drawn, not left out."))
    return lines


def _identity(dino: dict, word: str, parts: list[dict]) -> Line:
    share = dino["relative"]
    if dino["ceiling"] is None:
        return WARN, "There is one photo only: no ceiling to compare with."
    if share is None:
        return WARN, f"The photos are no more alike than any {word} is to them: no scale to read identity on."
    if share >= SAME and not _off(parts, OFTEN):
        level, how = GOOD, "It is the same subject"
    elif share >= RELATIVE:
        level, how = WARN, "It resembles the subject"
    else:
        level, how = BAD, "It is not yet the subject"
    return level, f"{how}: {share:.0%} of the way from any {word} to the photos."


def _parts(parts: list[dict]) -> Line:
    """Toyland: which parts are another's, in more images than a probe misreads of the right one."""
    wrong = _off(parts, CLEARLY)
    if not wrong:
        return GOOD, "Every part is the subject's: its colours, pattern, shapes and proportions."
    text = ", ".join(
        f"{part['words']} in {part['off']} of {part['of']} images" for part in sorted(wrong, key=lambda p: -p["off"])
    )
    return WARN, f"{text[0].upper()}{text[1:]}."


def _off(parts: list[dict], share: float) -> list[dict]:
    """Those that are another's in a larger share of the images than is misread of the right subject, by `share`."""
    return [part for part in parts if part["off"] > (part["usual"] + share) * part["of"]]


def _adherence(clip_t: dict) -> Line:
    if clip_t.get("optimised"):
        return WARN, "Whether it still listens is not said: the images were drawn towards CLIP-T, which is no score of them."
    lost = (clip_t["floor"] - clip_t["score"]) / abs(clip_t["floor"]) if clip_t["floor"] else 0.0
    level, how = (GOOD, "It still listens") if lost <= LISTENS else (WARN if lost <= HARDLY else BAD, "It listens less")
    change = round(clip_t["score"] - clip_t["floor"], 3) + 0.0  # no negative zero
    return level, f"{how}: CLIP-T {change:+.3f} against the base on the same prompts."


def _class(drift: dict, word: str) -> Line:
    share = drift["share"]
    if share is None:
        return WARN, f"Whether a {word} is still any {word} cannot be said: the photos are no more alike than class images."
    level = GOOD if share < STILL else WARN if share < DRIFTED else BAD
    still = f"A {word} is still any {word}" if share < STILL else f"Other {word}s have begun to look like it"
    moved = f"moved {share:.0%} of the way to the photos" if share > 0 else "did not move towards the photos"
    return level, f"{still}: class images {moved}."


def _bleed(bleed: dict) -> Line:
    share = bleed["share"]
    if share is None:
        return WARN, "Whether the subjects stay apart cannot be said: their photos are as alike as those of one."
    level = GOOD if share < STILL else WARN if share < DRIFTED else BAD
    how = "The subjects stay apart" if share < STILL else "One subject shows in another"
    way = f"{share:.0%} of the way to the photos of {bleed['photos']}" if share > 0 else "no nearer to the photos of any other"
    return level, f"{how}: images of {bleed['word']} are {way}{', at most' if share < STILL and share > 0 else ''}."


def _copies(copying: dict) -> Line:
    copied, count = copying["copied"], copying["pictures"]
    level = BAD if copied > count / 2 else WARN
    return level, f"{copied} of {count} images are nearer to a photo than the photos are to each other: look for copies."
