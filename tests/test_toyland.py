"""Toyland: a pure function of seeds, held-out seeds apart, a real CLIP tokenizer, weights that diffusers loads."""

import json
import subprocess
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalize.models import TOYLAND
from personalize.toyland import examples, world
from personalize.toyland.drawing import draw
from personalize.toyland.subjects import DRAW

EXAMPLES = Path(__file__).parents[1] / "data_examples"


def test_a_picture_is_a_function_of_its_seed_in_any_process():
    here = draw(world.scene(7))[0].tobytes()
    code = "import sys; from personalize.toyland import world, drawing; \
sys.stdout.buffer.write(drawing.draw(world.scene(7))[0].tobytes())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert here == there != draw(world.scene(8))[0].tobytes()


@pytest.mark.parametrize("word", world.CLASSES)
@pytest.mark.parametrize("action", world.ACTIONS)
def test_the_mask_is_where_the_subject_is(word, action):
    scene = world.scene(3, who=world.subject(5, word), action=action, hat="red", place="snow")
    picture, mask = (np.asarray(part).astype(int) for part in draw(scene))
    other = world.scene(3, who=world.subject(6, word), action=action, hat="blue", place="snow")
    changed = np.abs(picture - np.asarray(draw(other)[0])).sum(2) > 60
    inside = mask > 128
    assert 0.03 < inside.mean() < 0.6
    assert changed[inside].mean() > 3 * changed[mask == 0].mean()


def test_every_class_is_drawn():
    assert set(DRAW) == set(world.CLASSES)


def test_captions_say_what_is_to_be_seen_and_rarely_a_rare_token():
    texts = Counter()
    for seed in range(4000):
        scene = world.scene(seed)
        words = world.caption(scene, seed)
        assert scene.subject.class_word in words
        if " hat" in words:
            assert f"{scene.hat} hat" in words
        for action in ("swimming", "jumping"):
            assert action not in words or scene.action == action
        texts["rare"] += any(token in words.split() for token in world.RARE_TOKENS)
    assert 0.004 < texts["rare"] / 4000 < 0.02


def test_example_and_evaluation_subjects_are_out_of_reach_of_pretraining():
    """Pretraining counts seeds up from 0, in `_scene` and `_view`; everything else starts at HELD_OUT."""
    from personalize.commands.pretrain import Pretrain

    highest = max(Pretrain().pictures, Pretrain().subjects * world.VIEWS)
    assert highest < world.HELD_OUT
    assert all(seed >= world.HELD_OUT for _, seed in examples.SUBJECTS.values())
    assert len({world.subject(seed, word) for word, seed in examples.SUBJECTS.values()}) == len(examples.SUBJECTS)


def test_the_example_photos_are_what_the_world_draws(tmp_path):
    examples.write(tmp_path)
    for name, (word, _) in examples.SUBJECTS.items():
        shipped, fresh = sorted((EXAMPLES / name).glob("*.png")), sorted((tmp_path / name).glob("*.png"))
        assert len(shipped) == len(fresh) == 5
        for a, b in zip(shipped, fresh):
            assert Image.open(a).tobytes() == Image.open(b).tobytes(), a
        assert tomllib.loads((EXAMPLES / name / "subject.toml").read_text())["class"] == word


def test_the_tokenizer_has_the_rare_tokens_whole_and_reads_any_text():
    from personalize.models.imports import lean

    with lean():
        from transformers import CLIPTokenizer
    words = CLIPTokenizer.from_pretrained(TOYLAND / "tokenizer")
    for word in (*world.RARE_TOKENS, *world.CLASSES, *world.COLOURS, "swimming", "jumping", "beach"):
        assert len(words(word, add_special_tokens=False).input_ids) == 1, word
    odd = "naïve zèbre 东京 🐕 xyz"
    assert words.decode(words(odd, add_special_tokens=False).input_ids).replace(" ", "") == odd.replace(" ", "")
    slow = CLIPTokenizer(
        vocab=json.loads((TOYLAND / "tokenizer" / "vocab.json").read_text()),
        merges=[tuple(line.split()) for line in (TOYLAND / "tokenizer" / "merges.txt").read_text().splitlines()[1:]],
    )
    assert slow("a sks dog swimming").input_ids == words("a sks dog swimming").input_ids


def test_the_weights_are_small_and_in_half_precision():
    from safetensors import safe_open

    files = list(TOYLAND.rglob("*.safetensors"))
    assert len(files) == 6
    assert sum(f.stat().st_size for f in files) < 40e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(k).get_dtype() for k in tensors.keys()} <= {"F16", "I64"}, file  # noqa: SIM118


def test_plain_diffusers_loads_and_draws_toyland():
    from personalize.models.imports import lean

    with lean():
        import torch
        from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(TOYLAND, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    night, snow = (
        pipeline(f"a dog {place}", num_inference_steps=10, guidance_scale=3.0, output_type="np",
                 num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)).images
        for place in ("in the city at night", "in the snow")
    )  # fmt: skip
    assert night.shape == (4, 64, 64, 3)
    assert snow.mean() - night.mean() > 0.3


def test_a_stopped_stage_goes_on_bit_for_bit(tmp_path):
    import torch

    from personalize.toyland.fitting import fit

    def trained(stops: list[int], state: Path) -> torch.Tensor:
        for steps in stops:
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 4)

            def loss(step: int, model=model, steps=steps) -> torch.Tensor:
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
                if step == steps:
                    raise KeyboardInterrupt
                return (model(x) - x).square().mean()

            try:
                fit(model, loss, state, steps=12, lr=1e-2, say=lambda *_: None, ema=0.9, save_seconds=0.0)
            except KeyboardInterrupt:
                continue
        return model.weight.detach()

    assert torch.equal(trained([12], tmp_path / "a.safetensors"), trained([5, 12], tmp_path / "b.safetensors"))


def test_drawing_takes_milliseconds():
    began = time.process_time()
    for k in range(30):
        draw(world.scene(k))
    assert (time.process_time() - began) / 30 < 0.05
