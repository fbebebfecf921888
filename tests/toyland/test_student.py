"""The part "student" of a base: what trains is what its file holds, and a stopped training goes on."""

import torch

from personalize import models
from personalize.commands.pretrain import _changed
from personalize.common import checkpoint
from personalize.common.bases import TOYLAND
from personalize.common.terminal import SILENT
from personalize.formats.safetensors_io import load_tensors
from personalize.generation import students
from personalize.methods import lora
from personalize.toyland.pretraining import student as part

FEW = _changed(part.Settings(), ["teacher=4", "at_once=2", "updates=2", "rows=4", "rank=3", "ema=0"])


def test_the_file_is_the_student_and_a_stopped_training_goes_on(tiny_sd, tmp_path):
    said, folder = [], tmp_path / "out"
    model = models.load_model(str(tiny_sd), device="cpu", say=SILENT.say)
    part.train(model, folder, tmp_path, FEW, said.append)
    whole = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    assert students.read_student(folder) == {"sampler": "ddim", "steps": 2, "guidance_baked": 2.2}
    assert any(line.startswith("student2 2/2") for line in said)
    (tmp_path / "out" / "student.json").unlink()
    part.train(model, folder, tmp_path, FEW, said.append)  # all is in the work folder
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == whole
    learned = part.Student(model.unet, FEW.rank, FEW.seed)
    z, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 499])
    cond = model.encode_prompts(["a photo of a dog", "a red hat"])
    with torch.no_grad():
        before = learned()(z, t, cond)
        learned.load_state_dict(checkpoint.load_state(tmp_path / "student2.safetensors")[0]["trained"])
        after, teacher = learned()(z, t, cond), learned.as_teacher()(z, t, cond)
        lora.load_adapter(model, folder, name="student", weight=1.0)
        loaded = model.predict(z, t, cond)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(teacher, after)
    torch.testing.assert_close(loaded, after, rtol=0, atol=2e-3)  # the file is in half precision


def test_the_student_that_ships_draws_in_two_steps_and_fits_its_base():
    folder = TOYLAND / "student"
    assert students.read_student(folder) == {"sampler": "ddim", "steps": 2, "guidance_baked": 2.2}
    layers = {name.split(".lora_")[0] for name in load_tensors(folder / "pytorch_lora_weights.safetensors", "a LoRA")}
    unet = [name for file in (TOYLAND / "unet").glob("*.safetensors") for name in load_tensors(file, "a U-Net")]
    assert layers <= {f"unet.{name.removesuffix('.weight')}" for name in unet} and len(layers) > 100
