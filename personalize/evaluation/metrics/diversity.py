"""DIV: how much the images of one prompt differ from each other (Ruiz et al. 2208.12242, 4.3); higher is better.

N images, H W pixels, P patches, D dimensions. The paper's distance is LPIPS, whose weights the user brings; the patch
distance needs none beyond DINO's, and is no LPIPS: never compare one with the other. Both depend on resolution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from personalize.common.errors import UserError
from personalize.evaluation.encoders import encoder_name
from personalize.formats import safetensors_io

Distance = Callable[[Tensor], Tensor]  # (n, ...) -> (n,n)

BATCH = 8  # images that go through AlexNet at once
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's statistics, for pixels in [-1,1]
# AlexNet as torchvision has it: number in `features`, shape of the weight, stride, padding, max-pooled before
TRUNK = (
    (0, (64, 3, 11, 11), 4, 2, False),
    (3, (192, 64, 5, 5), 1, 2, True),
    (6, (384, 192, 3, 3), 1, 1, True),
    (8, (256, 384, 3, 3), 1, 1, False),
    (10, (256, 256, 3, 3), 1, 1, False),
)
SHAPES = {
    name: shape
    for tap, (number, weight, *_) in enumerate(TRUNK)
    for name, shape in (
        (f"features.{number}.weight", weight),
        (f"features.{number}.bias", weight[:1]),
        (f"lin{tap}.model.1.weight", (1, weight[0], 1, 1)),
    )
}
CONVERSION = """\
import torch; from safetensors.torch import save_file
save_file({k: v.detach().contiguous() for f in ("alexnet-owt-7be5be79.pth", "alex.pth") for k, v in torch.load(f, "cpu", \
weights_only=True).items() if k.startswith(("features.", "lin"))}, "lpips.safetensors")"""


def pairwise(distance: Distance, images: Tensor, prompts: Sequence[Hashable]) -> Tensor:
    """(N, ...) images or their patches, N prompts  ->  (N,): mean distance to the other images of the same prompt.

    NaN for the only image of a prompt, which says nothing of variety.
    """
    assert len(images) == len(prompts), (len(images), len(prompts))
    means = torch.full((len(prompts),), torch.nan)
    for prompt, count in Counter(prompts).items():
        if count > 1:
            rows = [i for i, other in enumerate(prompts) if other == prompt]
            between = distance(images[rows])
            means[rows] = (between.sum(1) - between.diagonal()) / (count - 1)
    return means


def patch_distance(patches: Tensor) -> Tensor:
    """(n,P,D) patches of length 1  ->  (n,n) in [0,2]: mean over the positions of 1 - cosine of the patches there."""
    flat = patches.float().flatten(1)
    return 1 - flat @ flat.T / patches.shape[1]


class Lpips:
    """LPIPS v0.1 on AlexNet (Zhang et al. 1801.03924): (n,3,H,W) in [-1,1], H and W from 31 on  ->  (n,n) on the CPU.

    name  the weights' file and the start of their SHA-256
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device | str = "cpu", name: str = "") -> None:
        assert all(weights[key].shape == shape for key, shape in SHAPES.items())
        self.weights = {key: weights[key].float().to(device) for key in SHAPES}
        self.device, self.name = device, name

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        rows = torch.cat([self._rows(part.to(self.device).float()) for part in images.split(BATCH)])
        return torch.stack([(rows - row).square().sum(1) for row in rows]).cpu()

    def _rows(self, images: Tensor) -> Tensor:
        """(B,3,H,W) -> (B,M), of which LPIPS is the squared distance: 11 MB an image at 512 px.

        The weights are not negative, and so sum w (a - b)² / hw is the squared distance of the sqrt(w / hw) a.
        """
        shift, scale = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (SHIFT, SCALE))
        x, rows = (images - shift) / scale, []
        for tap, (number, _, stride, padding, pooled) in enumerate(TRUNK):
            x = F.max_pool2d(x, 3, 2) if pooled else x
            weight, bias = self.weights[f"features.{number}.weight"], self.weights[f"features.{number}.bias"]
            x = F.conv2d(x, weight, bias, stride, padding).relu()
            unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
            factor = (self.weights[f"lin{tap}.model.1.weight"] / x[0, 0].numel()).sqrt()
            rows.append((unit * factor).flatten(1))
        return torch.cat(rows, 1)


def read_lpips(file: str | Path, device: torch.device | str = "cpu") -> Lpips:
    """The one `.safetensors` of AlexNet's `features` (torchvision's names) and `lin0` to `lin4` (lpips' names)  ->  Lpips.

    UserError for a file that is absent, a pickle, damaged, without one of the weights, or with one of another shape.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() in safetensors_io.PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened, so it is never read. Convert it once, in a folder "
            "with torchvision's alexnet-owt-7be5be79.pth (download.pytorch.org/models) and LPIPS' alex.pth "
            f"(github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1), by these two lines of Python:\n{CONVERSION}\n"
            "and give the result: --set evaluate.lpips=lpips.safetensors"
        )
    weights = safetensors_io.load_tensors(path, "the weights of LPIPS")
    for key, shape in SHAPES.items():
        if key not in weights:
            raise _refusal(path, f"it lacks {key}")
        if weights[key].shape != shape:
            raise _refusal(path, f"{key} is {tuple(weights[key].shape)}, where {shape} is needed")
        if not weights[key].is_floating_point():
            raise _refusal(path, f"{key} is not of floating numbers")
        if key.startswith("lin") and (weights[key] < 0).any():
            raise _refusal(path, f"{key} has negative weights, which no distance has")
    weights = {key: weights[key].float() for key in SHAPES}
    return Lpips(weights, device, encoder_name(path.name, weights))


def _refusal(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} does not hold LPIPS v0.1 for AlexNet: {why}. Make it anew with these two lines of Python, from torchvision's "
        f"alexnet-owt-7be5be79.pth and LPIPS' lpips/weights/v0.1/alex.pth:\n{CONVERSION}"
    )
