"""On a real card: the same words give the same bits in half precision, and a photo comes back."""

import pytest
import torch

from personalize import models
from personalize.common.recipe_sections import SamplingConfig
from personalize.generation import sampling
from personalize.generation.editing import Edit, sample_edits
from personalize.generation.words import Emphasis

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_edits_are_those_of_a_cpu(request, name, dtype):
    model = models.load_model(str(request.getfixturevalue(name)), device="cuda", dtype=dtype, say=lambda line: None)
    config = SamplingConfig(sampler="ddpm", steps=4, guidance=3.0)
    photo = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"photo": photo, "first": 1}):
        streams = sampling.image_generators(0, range(2))
        source, _, same = sample_edits(model, Edit("a photo of a dog", "a photo of a dog"), streams, config, **options)
        assert torch.equal(source, same) and source.is_cuda and source.isfinite().all()
        if options and dtype == "float32":
            torch.testing.assert_close(source, photo.cuda().expand_as(source), rtol=0, atol=1e-3)
    hat = Edit("a photo of a dog", "a photo of a red hat", emphasis=Emphasis((("hat", 1.5),), ("red",)))
    source, plain, edited = sample_edits(model, hat, sampling.image_generators(0, range(2)), config)
    assert min((edited - plain).abs().max(), (edited - source).abs().max()) > 1e-3
