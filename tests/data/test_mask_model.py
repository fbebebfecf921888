"""Masks by a network that the user brings: they lie on the subject, nothing of the user's is changed, no file is trusted."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from personalize.commands.check_photos import check_photos
from personalize.common import untrusted
from personalize.common.errors import UserError
from personalize.data import mask_files
from personalize.data.mask_model import DEVIATIONS, read_mask_model
from personalize.data.photo_checks import WARNING
from personalize.data.photos import load_photos

MEAN = np.array([0.485, 0.456, 0.406])


def nodes_of(onnx, side, *, gain=8.0):
    """The share is a sigmoid of how far the colours' mean is from the middle grey: what is light is the subject."""
    make, number = onnx.helper.make_node, onnx.numpy_helper.from_array
    constants = [number(np.float32(gain / DEVIATIONS[320][0]), "gain")]
    if side == 1024:
        constants = [number(np.float32(gain), "gain")]
    return [
        make("ReduceMean", ["image"], ["mean"], axes=[1], keepdims=1), make("Mul", ["mean", "gain"], ["far"]),
        make("Sigmoid", ["far"], ["shares"]),
    ], constants  # fmt: skip


def write_model(onnx, path, *, side=320, shape=None, output="shares", more=(), gain=8.0):
    nodes, constants = nodes_of(onnx, side, gain=gain)
    kind = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info("image", kind, shape or [1, 3, side, side])]
    outputs = [onnx.helper.make_tensor_value_info(output, kind, None)]
    graph = onnx.helper.make_graph([*nodes, *more], "light", inputs, outputs, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def model(onnx, tmp_path_factory):
    return write_model(onnx, tmp_path_factory.mktemp("model") / "light.onnx")


def disc(size=(120, 80), box=(70, 10, 110, 50), light="white", dark="black"):
    """A light disc on the dark, and the disc as a mask."""
    image, mask = Image.new("RGB", size, dark), Image.new("L", size)
    ImageDraw.Draw(image).ellipse(box, fill=light)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return image, mask


def make_masks(photos, model):
    return mask_files.make_masks(photos, lambda images: map(read_mask_model(model), images), model.name)


def overlap(a, b):
    a, b = (np.asarray(mask) >= 128 for mask in (a, b))
    return (a & b).sum() / (a | b).sum()


def test_photos_without_a_mask_get_one_and_nothing_else_changes(model, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "a.html"
    folder.mkdir()
    image, truth = disc((480, 320), (280, 40, 440, 200))
    for name in ("bare.jpg", "file.png", "beside.png"):
        image.save(folder / name)
    truth.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "beside.mask.png")
    cut = image.copy()
    cut.putalpha(truth)
    cut.save(folder / "alpha.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = check_photos(folder, size=64, mask=str(model), out=out)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert sorted(path.name for path in (folder / "masks").iterdir()) == ["bare.png", "file.png"]
    told = [finding.text for finding in result.findings if "light.onnx" in finding.text]
    assert told == ["masks/ has masks by light.onnx for bare.jpg, file.png: see that their outlines are right"]
    assert "the subject outlined" in out.read_text()
    photos = {photo.name: photo for photo in load_photos(folder, min_size=1)[0]}
    for name in ("bare.jpg", "file.png"):
        assert overlap(photos[name].mask, truth) > 0.97 and photos[name].mask.size == image.size
        shades = (np.asarray(photos[name].mask)[120] // 8 % 31 > 0).sum()
        assert 4 <= shades <= 30, "the edge is feathered, a few pixels wide"
    made = (folder / "masks" / "bare.png").read_bytes()
    assert not make_masks(list(photos.values()), model)[0] and (folder / "masks" / "bare.png").read_bytes() == made


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("size", [(120, 80), (96, 96)])
def test_a_mask_lies_on_its_photo_however_that_is_stored(model, tmp_path, orientation, size):
    image, _ = disc(size, (50, 10, 90, 50))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    (photo,), _ = load_photos(tmp_path, min_size=1)
    make_masks([photo], model)
    (photo,), _ = load_photos(tmp_path, min_size=1)
    assert overlap(photo.mask, photo.image.convert("L")) > 0.9


@pytest.mark.parametrize("side", DEVIATIONS)
def test_a_network_sees_a_photo_as_it_was_trained_to(onnx, tmp_path, side):
    segment = read_mask_model(write_model(onnx, tmp_path / "a.onnx", side=side, gain=1.0))
    light, dark = (200, 120, 40), (40, 20, 60)
    image, _ = disc((side, side), (0, 0, side // 2, side // 2), light, dark)
    gain = 1 / DEVIATIONS[320][0] if side == 320 else 1.0

    def share(colour):  # the brightest value counts as 1
        value = gain * ((np.array(colour) / 200 - MEAN) / np.array(DEVIATIONS[side])).mean()
        return 1 / (1 + np.exp(-value))

    assert share(light) > 0.5 > share(dark)
    mask = np.rint(255 * segment(image))
    assert (mask[side // 4, side // 4], mask[-1, -1]) == (255, 0), "stretched to black and white"
    gray = (120, 110, 100)
    image.paste(gray, (side // 2, side // 2, side, side))
    want = 255 * (share(gray) - share(dark)) / (share(light) - share(dark))
    assert abs(int(np.rint(255 * segment(image))[3 * side // 4, 3 * side // 4]) - want) <= 1


@pytest.mark.parametrize(
    "image, told",
    [
        (Image.new("RGB", (80, 80)), "light.onnx finds nothing in a.png"),
        (disc((80, 80), (10, 10, 18, 18))[0], "the mask of a.png marks 1.0% of the photo as the subject"),
        (disc((80, 80), (70, 70, 79, 79), "black", "white")[0], "the mask of a.png marks 98.8% of the photo as the subject"),
    ],
)
def test_no_mask_is_kept_that_finds_nothing_or_everything(model, tmp_path, image, told):
    image.save(tmp_path / "a.png")
    made, (finding,) = make_masks(load_photos(tmp_path, min_size=1)[0], model)
    assert not made and finding.severity == WARNING and finding.path == str(tmp_path / "a.png")
    assert finding.text.startswith(told) and not (tmp_path / "masks").exists()


def test_a_mask_is_never_of_two_photos_and_never_takes_a_place(model, tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        disc()[0].save(tmp_path / name)
    photos, _ = load_photos(tmp_path, min_size=1)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "b.png").write_text("mine")
    made, findings = make_masks(photos, model)
    assert not made and [finding.text.split()[5] for finding in findings] == ["a.jpg:", "a.png:", "b.png:"]
    assert (tmp_path / "masks" / "b.png").read_text() == "mine"


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_mask_model(path)(disc()[0])
    return str(caught.value)


def test_other_models_are_refused_with_what_is_wrong(onnx, tmp_path, monkeypatch):
    path = tmp_path / "a.onnx"

    def of(**options):
        return refusal(write_model(onnx, path, **options))

    assert "its input is image [1, 3, 512, 512], where 1 × 3 × 320 × 320" in of(shape=[1, 3, 512, 512])
    assert "its input is image ['n', 1, 320, 320]" in of(shape=["n", 1, 320, 320])
    assert "its input is image [2, 3, 320, 320]" in of(shape=[2, 3, 320, 320])
    assert "its values go from" in of(output="far"), "no shares but logits"
    flat = onnx.helper.make_node("Flatten", ["shares"], ["flat"])
    assert "its first output is (1, 102400), where (1, 1, 320, 320)" in of(output="flat", more=[flat])
    custom = onnx.helper.make_node("Anything", ["shares"], ["odd"], domain="evil.com")
    assert "onnxruntime refuses it" in of(output="odd", more=[custom])
    path.write_bytes(b"no model\xff" * 9)
    assert "it is not ONNX" in refusal(path)
    path.write_bytes(b"")
    assert "cannot be used" in refusal(path)
    assert "absent.onnx" in refusal(tmp_path / "absent.onnx") and "is a folder" in refusal(tmp_path)
    monkeypatch.setitem(untrusted.MOST_BYTES, "mask model", 100)
    assert "more than the 100 bytes" in of()


@pytest.mark.parametrize("where", ["initializer", "attribute", "subgraph"])
def test_a_model_that_points_to_other_files_is_refused_before_any_is_opened(onnx, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(b"\0" * 4)
    tensor = onnx.TensorProto(name="gain", data_type=onnx.TensorProto.FLOAT, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret")
    model = onnx.load_model_from_string(write_model(onnx, tmp_path / "a.onnx").read_bytes())
    constant = onnx.helper.make_node("Constant", [], ["gain"], value=tensor)
    if where == "initializer":
        model.graph.initializer[0].CopyFrom(tensor)
    elif where == "attribute":
        model.graph.node.insert(0, constant)
    else:
        branch = onnx.helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["gain"], ["x"], then_branch=branch, else_branch=branch))
    Path("a.onnx").write_bytes(model.SerializeToString())
    assert "it keeps its weights in other files, which are never opened" in refusal(tmp_path / "a.onnx")


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="a.onnx needs onnx and onnxruntime: pip install"):
        read_mask_model(tmp_path / "a.onnx")
    disc()[0].save(tmp_path / "a.png")
    with pytest.raises(UserError, match="masks are written beside photo files"):
        check_photos(f"hf:{tmp_path}", size=64, mask=str(tmp_path / "a.onnx"), out=tmp_path / "a.html")
