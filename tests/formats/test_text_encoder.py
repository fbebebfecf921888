"""The keys of text encoders that we write are those of released checkpoints, which every version of transformers reads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize import models
from personalize.common.bases import TOYLAND
from personalize.formats.text_encoder import write_released_keys

# As text_encoder/model.safetensors of Stable Diffusion 1.5 and SDXL has them, for one of its layers.
ENDS = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
ENDS += ("final_layer_norm.weight", "final_layer_norm.bias")
LAYER = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]


def released_keys(layers):
    inside = {
        f"text_model.encoder.layers.{k}.{name}.{end}" for k in range(layers) for name in LAYER for end in ("weight", "bias")
    }
    return {f"text_model.{end}" for end in ENDS} | inside


def test_toyland_has_the_keys_of_a_release_and_is_the_base_it_was():
    place = TOYLAND / "text_encoder"
    layers = json.loads((place / "config.json").read_text())["num_hidden_layers"]
    assert set(load_file(place / "model.safetensors")) == released_keys(layers)
    assert models.fingerprint(TOYLAND) == "4dbf7bd25cdb", "runs that older versions made on it would not open"


@pytest.mark.parametrize("sharded", [False, True])
def test_keys_without_text_model_get_it_and_a_linked_original_stays(tmp_path, sharded):
    names = sorted(released_keys(2))
    bare = {name.removeprefix("text_model."): torch.full((2,), float(k)) for k, name in enumerate(names)}
    bare["text_projection.weight"] = torch.ones(2, 2)
    shards = [dict(list(bare.items())[k::2]) for k in (0, 1)] if sharded else [bare]
    folder, copy = tmp_path / "base", tmp_path / "copy"
    folder.mkdir()
    for k, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{k}.safetensors", metadata={"format": "pt"})
    index = {name: f"model-{k}.safetensors" for k, tensors in enumerate(shards) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shutil.copytree(folder, copy, copy_function=lambda a, b: (tmp_path / "copy").joinpath(b).hardlink_to(a))
    write_released_keys(copy)
    found = {k: v for path in copy.glob("*.safetensors") for k, v in load_file(path).items()}
    assert set(found) == {*names, "text_projection.weight"}
    assert all(torch.equal(found[name], bare[name.removeprefix("text_model.")]) for name in names)
    assert set(json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]) == set(found)
    assert {k for path in folder.glob("*.safetensors") for k in load_file(path)} == set(bare)
    times = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    write_released_keys(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == times, "nothing is written twice"
