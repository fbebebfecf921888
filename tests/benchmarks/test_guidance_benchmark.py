"""What `benchmarks.guidance` compares is what it says; with hardly any images, its parts run."""

import pytest

from benchmarks import guidance


def test_each_clip_row_is_held_against_the_cfg_row_of_the_nearest_clip_t():
    right, wrong = {("a", 0): 1.0, ("b", 1): 1.0}, {("a", 0): 0.0, ("b", 1): 1.0}
    scored = {"rendered": (0.7, right), "CFG 1": (0.5, wrong), "CFG 3": (0.8, right)}
    scored |= {"CLIP 1": (0.55, wrong), "CLIP 5": (0.9, wrong)}
    lines = guidance.equal_clip_t(scored | {"CFG 2.2 + CLIP 1": (0.9, right)})
    assert len(lines) == 2
    assert "truth of CFG 1 less CLIP 1, CLIP-T 0.500 and 0.550: +0.000" in lines[0]
    assert "truth of CFG 3 less CLIP 5, CLIP-T 0.800 and 0.900: +0.500" in lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["glide", "classes"])
def test_a_part_writes_its_table(part, tmp_path, monkeypatch):
    monkeypatch.setitem(guidance.CLASSIFIER, "steps", 3)
    guidance.main(tmp_path, part, count=12, steps=2)
    text = (tmp_path / f"guidance-{part}.md").read_text()
    assert "| --- |" in text and "--count 12 --steps 2" in text
