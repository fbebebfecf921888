"""LoKr and LoHa files: what they add to each weight, by LyCORIS' formulas, which are written here once more."""

from functools import cache

import pytest
import tiny_releases as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from personalize.common.errors import UserError
from personalize.formats import lycoris
from personalize.formats.lycoris import Adapter

FAMILY = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl"}
LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
POINT, WINDOW = "unet.up_blocks.1.resnets.2.conv_shortcut", "unet.mid_block.resnets.0.conv1"
TEXT = next(f"text_encoder.{layer}" for layer in tiny.layers("sd1")["text_encoder"] if layer.endswith("layers.0.mlp.fc1"))
STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@cache
def shapes(family="sd1"):
    networks = tiny.models(family)
    return {
        part: {layer: tuple(networks[part].get_submodule(layer).weight.shape) for layer in layers}
        for part, layers in tiny.layers(family).items()
    }


def shape_of(name, family="sd1"):
    part, _, layer = name.partition(".")
    return shapes(family)[part][layer]


def near(n):
    """The largest divisor not above the root, as LyCORIS splits a width."""
    return max(k for k in range(1, int(n**0.5) + 1) if n % k == 0)


def factors(form, shape, rank=2):
    """Random factors in one of the forms that a layer of this shape can have in a file."""
    out, inner, *window = shape
    size = 1
    for k in window:
        size *= k
    a, c = near(out), near(inner)
    b, d = out // a, inner // c
    made = {
        "lokr whole": {"lokr_w1": (a, c), "lokr_w2": (b, d, *window)},
        "lokr": {"lokr_w1": (a, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * size)},
        "lokr both": {
            "lokr_w1_a": (a, rank), "lokr_w1_b": (rank, c), "lokr_w2_a": (b, rank), "lokr_w2_b": (rank, d * size),
        },
        "lokr tucker": {
            "lokr_w1": (a, c), "lokr_w2_a": (rank, b), "lokr_w2_b": (rank, d), "lokr_t2": (rank, rank, *window),
        },
        "loha": {f"hada_w{i}_{end}": ((out, rank) if end == "a" else (rank, inner * size)) for i in "12" for end in "ab"},
        "loha tucker": {f"hada_w{i}_{end}": (rank, out if end == "a" else inner) for i in "12" for end in "ab"}
        | {f"hada_t{i}": (rank, rank, *window) for i in "12"},
    }[form]  # fmt: skip
    torch.manual_seed(0)
    return {role: torch.randn(size) for role, size in made.items()}


def by_hand(f, shape, scale):
    """The update, entry by entry: lokr's w1[o/b, i/d] w2[o%b, i%d, ·], loha's product of two matrices."""
    out, inner, *window = shape
    f = {role: value.double() for role, value in f.items()}

    def matrix(stem, rows, columns):
        a, b = f[f"{stem}_a"], f[f"{stem}_b"]
        if (core := f.get(stem.replace("_w", "_t"))) is not None:
            return sum(
                core[i, j] * a[i].reshape(-1, 1, 1, 1) * b[j].reshape(1, -1, 1, 1)
                for i in range(len(a)) for j in range(len(b))
            )  # fmt: skip
        return (a @ b).reshape(rows, columns, *window)

    if "hada_w1_a" in f:
        return scale * matrix("hada_w1", out, inner) * matrix("hada_w2", out, inner)
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    b, d = out // w1.shape[0], inner // w1.shape[1]
    w2 = f["lokr_w2"] if "lokr_w2" in f else matrix("lokr_w2", b, d)
    o, i = torch.arange(out), torch.arange(inner)
    return scale * w1[o // b][:, i // d].reshape(out, inner, *[1] * len(window)) * w2[o % b][:, i % d]


FORMS = [
    *(("lokr whole", name) for name in (LINEAR, POINT, WINDOW, TEXT)),
    *(("lokr", name) for name in (LINEAR, POINT, WINDOW, TEXT)),
    *(("lokr both", name) for name in (LINEAR, POINT, WINDOW)),
    ("lokr tucker", WINDOW),
    *(("loha", name) for name in (LINEAR, POINT, WINDOW, TEXT)),
    ("loha tucker", WINDOW),
]


@pytest.mark.parametrize("form, name", FORMS)
@pytest.mark.parametrize("spelling", ["kohya", "wrapper", "dotted"])
def test_what_a_file_adds_is_what_lycoris_adds(tmp_path, form, name, spelling):
    """alpha / rank once; two whole matrices ignore alpha."""
    made, shape, path = factors(form, shape_of(name)), shape_of(name), tmp_path / "a.safetensors"
    part, _, layer = name.partition(".")
    head = {"kohya": {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part], "wrapper": "lycoris_", "dotted": f"{part}."}
    key = head[spelling] + (layer if spelling == "dotted" else layer.replace(".", "_"))
    save_file({f"{key}.{role}": value for role, value in made.items()} | {f"{key}.alpha": torch.tensor(3.0)}, path)
    found = lycoris.read_lycoris(path, shapes(), "base")
    assert found.kind == form.split()[0] and list(found.layers) == [name]
    scale = 1 if form == "lokr whole" else 3 / 2
    assert torch.allclose(lycoris.delta(found.layers[name], shape).double(), by_hand(made, shape, scale), atol=1e-5)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_written_has_a_scale_of_one_and_is_read_as_the_same_update(tmp_path, family, kind):
    path, all_of = tmp_path / "a.safetensors", shapes(family)
    names = [f"{part}.{layer}" for part, layers in all_of.items() for layer in layers]
    made = Adapter(kind, {name: factors(kind, shape_of(name, family)) for name in names[::7]})
    lycoris.write_kohya(path, made, all_of, family=FAMILY[family], metadata={"ss_output_name": "x"})
    tensors, found = load_file(path), lycoris.read_lycoris(path, all_of, "base")
    assert found.layers.keys() == made.layers.keys()
    for name in made.layers:
        shape = shape_of(name, family)
        assert torch.allclose(
            lycoris.delta(found.layers[name], shape).double(), by_hand(made.layers[name], shape, 1), atol=1e-5
        )
    for key in [key for key in tensors if key.endswith(".alpha")]:  # alpha / rank is 1 to whoever divides, or divides twice
        rank = next((len(v) for k, v in tensors.items() if k.startswith(key[:-5]) and k.endswith(("w1_b", "w2_b"))), 1)
        assert tensors[key] == rank
    roles = {key.rpartition(".")[2] for key in tensors} - {"alpha"}
    assert roles == ({"lokr_w1", "lokr_w2"} if kind == "lokr" else {f"hada_w{i}_{end}" for i in "12" for end in "ab"})
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert said["ss_network_module"] == "lycoris.kohya" and said["ss_network_args"] == f'{{"algo": "{kind}"}}'
    prefix = "lora_te1_" if family == "sdxl" else "lora_te_"
    assert {key.split("_text_")[0] + "_" for key in tensors if key.startswith(prefix)} == {prefix}


def test_half_precision_is_written_where_asked(tmp_path):
    made = Adapter("loha", {LINEAR: factors("loha", shape_of(LINEAR))})
    lycoris.write_kohya(tmp_path / "a.safetensors", made, shapes(), family="sd", half=True)
    assert {v.dtype for k, v in load_file(tmp_path / "a.safetensors").items() if "hada" in k} == {torch.float16}


SQUARE = {f"{STEM}.lokr_w1": torch.ones(4, 4), f"{STEM}.lokr_w2": torch.ones(8, 8)}


@pytest.mark.parametrize("more, words", [
    ({f"{STEM}.lokr_w2": None}, "has only lokr_w1 of layer unet.mid_block.*not whole"),
    ({f"{STEM}.lokr_w2": torch.ones(8, 7)}, r"made for another base, or is damaged.*lokr_w2 \(8, 7\).*\(32, 32\)"),
    ({f"{STEM}.lokr_w2": torch.ones(4, 16)}, "made for another base"),
    ({f"{STEM}.lokr_w2": torch.ones(8)}, "made for another base"),
    ({f"{STEM}.lokr_w2": torch.ones(0, 8)}, "made for another base"),
    ({f"{STEM}.alpha": torch.tensor([1.0, 2.0])}, "not one finite number"),
    ({f"{STEM}.lokr_w2": torch.full((8, 8), float("nan"))}, "not a finite number"),
    ({f"{STEM}.dora_scale": torch.ones(32, 1)}, "a lokr with dora_scale"),
    ({f"{STEM}.lora_up.weight": torch.ones(32, 2)}, "a lokr and something else in one file"),
    ({f"{STEM}.hada_w1_a": torch.ones(32, 2)}, "a lokr and something else in one file"),
    ({f"{STEM}.w_norm": torch.ones(2)}, "something else in one file"),
    ({"lora_unet_single_blocks_0.lokr_w1": torch.ones(2, 2)}, "made for another base than 'base'"),
    ({"lora_te_text_model_encoder_layers_0_mlp_fc1.diff": torch.ones(2)}, "something else in one file"),
])  # fmt: skip
def test_a_file_that_is_not_whole_or_not_of_the_base_is_refused(tmp_path, more, words):
    path = tmp_path / "a.safetensors"
    save_file(SQUARE, path)
    assert list(lycoris.read_lycoris(path, shapes(), "base").layers) == [LINEAR]
    save_file({key: value for key, value in (SQUARE | more).items() if value is not None}, path)
    with pytest.raises(UserError, match=words):
        lycoris.read_lycoris(path, shapes(), "base")


def test_a_whole_matrix_is_split_where_its_rank_allows():
    shape = shape_of(WINDOW)
    made = factors("lokr", shape)
    whole = {"lokr_w1": made["lokr_w1"], "lokr_w2": (made["lokr_w2_a"] @ made["lokr_w2_b"]).reshape(8, 8, 3, 3)}
    split = lycoris.fitted("it", whole, made, 2)
    assert {role: v.shape for role, v in split.items()} == {role: v.shape for role, v in made.items()}
    assert torch.allclose(lycoris.delta(split, shape), lycoris.delta(made, shape), atol=1e-5)
    with pytest.raises(UserError, match=r"it: lokr_w2 has the rank 2, more than the recipe's 1. Set lora.rank = 2"):
        lycoris.fitted("it", whole, made, 1)
    tucker = factors("loha tucker", shape)
    with pytest.raises(UserError, match="it has the factors hada_t1"):
        lycoris.fitted("it", tucker, factors("loha", shape), 2)
