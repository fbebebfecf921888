"""DIV is the mean distance among the images of one prompt, and LPIPS is the published one, weight for weight."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.common.errors import UserError
from personalize.core.rng import generator
from personalize.evaluation.metrics import diversity
from personalize.evaluation.metrics.diversity import SHAPES, Lpips, pairwise, patch_distance, read_lpips


def images(n, size=35, k=0):
    return torch.rand(n, 3, size, size, generator=generator(0, "lpips", k)) * 2 - 1


def drawn_weights():
    """Random, scaled so that every tap is alive, and not negative in the last layers."""
    g = generator(0, "alexnet")
    weights = {}
    for name, shape in SHAPES.items():
        drawn = torch.randn(*shape, generator=g)
        weights[name] = drawn.abs() if name.startswith("lin") else drawn * (2 / math.prod(shape[1:])) ** 0.5
    return weights


@pytest.fixture(scope="module")
def weights():
    return drawn_weights()


# --- pairs ---


def test_pairwise_is_the_mean_over_the_other_images_of_the_prompt():
    points, prompts = torch.tensor([0.0, 5.0, 1.0, 4.0, 9.0]), ["a", "b", "a", "a", "c"]
    got = pairwise(lambda x: (x[:, None] - x).abs() + torch.eye(len(x)), points, prompts)  # never an image with itself
    assert got[[0, 2, 3]].tolist() == [2.5, 2, 3.5] and got[[1, 4]].isnan().all()


def test_patch_distance_compares_the_same_positions_only():
    eye = torch.eye(4)
    patches = torch.stack([eye[:2], eye[:2], eye[:2].flip(0), torch.stack([eye[0], -eye[1]]), torch.stack([eye[0], eye[3]])])
    assert patch_distance(patches)[0].tolist() == [0, 0, 1, 1, 0.5]


def test_patch_distance_is_its_definition_in_loops():
    patches = torch.nn.functional.normalize(torch.randn(4, 9, 5, generator=generator(0, "patches")), dim=-1)
    want = [[sum(1 - float(p @ q) for p, q in zip(a, b, strict=True)) / 9 for b in patches] for a in patches]
    np.testing.assert_allclose(patch_distance(patches), want, atol=1e-6)


# --- LPIPS ---


def convolved(x, weight, bias, stride, padding):
    """(C,H,W) -> (O,h,w), position by position in float64."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    k = weight.shape[-1]
    side = (x.shape[1] - k) // stride + 1
    out = np.empty((len(weight), side, side))
    for i in range(side):
        for j in range(side):
            window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = (weight * window).sum((1, 2, 3)) + bias
    return out


def pooled(x):
    side = (x.shape[1] - 3) // 2 + 1
    return np.array(
        [[x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(side)] for i in range(side)]
    ).transpose(2, 0, 1)


def brute_force(a, b, weights):
    """LPIPS of two images (3,H,W), step by step as the paper has it."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    a, b = ((x.double().numpy() - shift[:, None, None]) / scale[:, None, None] for x in (a, b))
    total = 0.0
    for tap, (number, stride, padding) in enumerate([(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]):
        if number in (3, 6):
            a, b = pooled(a), pooled(b)
        kernel, bias, lin = w[f"features.{number}.weight"], w[f"features.{number}.bias"], w[f"lin{tap}.model.1.weight"]
        a, b = (np.maximum(convolved(x, kernel, bias, stride, padding), 0) for x in (a, b))
        places = [(i, j) for i in range(a.shape[1]) for j in range(a.shape[2])]
        for i, j in places:
            p, q = (x[:, i, j] / (np.sqrt((x[:, i, j] ** 2).sum()) + 1e-10) for x in (a, b))
            total += (lin[0, :, 0, 0] * (p - q) ** 2).sum() / len(places)
    return total


def test_lpips_is_its_definition_in_loops(weights):
    three = images(3)
    want = [[brute_force(a, b, weights) for b in three] for a in three]
    got = Lpips(weights)(three)
    assert got.dtype == torch.float32 and want[0][1] > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_lpips_is_symmetric_zero_for_equal_images_and_the_same_in_any_batch(weights, monkeypatch):
    lpips, five = Lpips(weights), images(5, size=64)
    five[3] = five[1]
    got = lpips(five)
    assert torch.equal(got, got.T) and got.diagonal().tolist() == [0] * 5 and got[1, 3] == 0
    assert (got[0, 1:] > 0).all()
    monkeypatch.setattr(diversity, "BATCH", 2)
    torch.testing.assert_close(lpips(five), got)


def test_lpips_of_weights_made_by_hand_is_known():
    """Only the first tap counts. Its channels 0 and 1 see light and dark, so every place turns by a right angle."""
    weights = {name: torch.zeros(*shape) for name, shape in SHAPES.items()}
    weights["features.0.weight"][0, 0, 5, 5], weights["features.0.weight"][1, 0, 5, 5] = 1, -1
    weights["lin0.model.1.weight"][0, 0], weights["lin0.model.1.weight"][0, 1] = 0.25, 0.5
    light, dark = torch.full((3, 35, 35), 0.9), torch.full((3, 35, 35), -0.9)
    half = light.clone()
    half[:, :, :16] = -0.9  # of the 8 columns of places the first 4
    got = Lpips(weights)(torch.stack([light, dark, half, light * 0.5]))
    assert got[0].tolist() == pytest.approx([0, 0.75, 0.375, 0], abs=1e-6)


def test_images_of_one_prompt_through_lpips_give_div(weights):
    four = images(4)
    got = pairwise(Lpips(weights), four, ["a", "a", "a", "b"])
    want = [(brute_force(four[0], four[k], weights)) for k in (1, 2)]
    assert got[0].item() == pytest.approx(sum(want) / 2, rel=1e-4) and got[3].isnan()


# --- its file ---


def test_a_file_gives_the_same_lpips_and_its_name_tells_the_weights(weights, tmp_path):
    file = tmp_path / "lpips.safetensors"
    save_file(weights | {"classifier.1.weight": torch.zeros(3)}, file)
    lpips = read_lpips(file)
    assert torch.equal(lpips(images(2)), Lpips(weights)(images(2)))
    assert lpips.name.startswith("lpips.safetensors sha256:")
    weights = weights | {"features.0.bias": weights["features.0.bias"] + 1}
    save_file(weights, tmp_path / "other.safetensors")
    assert read_lpips(tmp_path / "other.safetensors").name.split()[1] != lpips.name.split()[1]


def test_a_pickle_is_refused_with_two_lines_that_make_a_file_which_is_read(weights, tmp_path, monkeypatch):
    trunk = {k: torch.nn.Parameter(v) for k, v in weights.items() if k.startswith("features.")}
    torch.save(trunk | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "alexnet-owt-7be5be79.pth")
    torch.save({k: v for k, v in weights.items() if k.startswith("lin")}, tmp_path / "alex.pth")
    with pytest.raises(UserError, match=r"pickle.*never read.*\n.*\n.*\n.*evaluate\.lpips=") as caught:
        read_lpips(tmp_path / "alex.pth")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(str(caught.value).splitlines()[1:3]))
    assert load_file("lpips.safetensors").keys() == SHAPES.keys()
    assert torch.equal(read_lpips("lpips.safetensors")(images(2)), Lpips(weights)(images(2)))


@pytest.mark.parametrize("name", ["lpips.pt", "lpips.bin", "lpips.PTH"])
def test_pickles_of_any_ending_are_refused_unread(name, tmp_path):
    with pytest.raises(UserError, match="pickle"):
        read_lpips(tmp_path / name)


@pytest.mark.parametrize(
    "key,change,why",
    [
        ("features.6.bias", None, r"lacks features\.6\.bias"),
        ("lin3.model.1.weight", None, r"lacks lin3\.model\.1\.weight"),
        ("features.0.weight", torch.zeros(64, 3, 3, 3), r"features\.0\.weight is \(64, 3, 3, 3\), where \(64, 3, 11, 11\)"),
        ("lin0.model.1.weight", torch.full((1, 64, 1, 1), -0.1), r"lin0\.model\.1\.weight has negative"),
        ("features.8.bias", torch.full((256,), torch.nan), r"features\.8\.bias' holds a value that is not a finite"),
    ],
)
def test_a_file_of_other_weights_is_refused_by_its_name_and_key(key, change, why, weights, tmp_path):
    weights = {name: value for name, value in weights.items() if name != key} | ({} if change is None else {key: change})
    save_file(weights, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=rf"mine\.safetensors.*{why}.*[Mm]ake it anew"):
        read_lpips(tmp_path / "mine.safetensors")


def test_an_absent_file_and_a_damaged_one_are_named(tmp_path):
    with pytest.raises(UserError, match="absent"):
        read_lpips(tmp_path / "absent.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="damaged"):
        read_lpips(tmp_path / "damaged.safetensors")
