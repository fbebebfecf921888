"""The parts of DALL·E 2: scale of embeddings, the causal prior, features of images, states in place of a prompt."""

import pytest
import torch
from torch.nn import functional as F

from personalize import models
from personalize.common.recipe_sections import SamplingConfig
from personalize.core import rng
from personalize.generation.sampling import sample_latents
from personalize.models import unclip
from personalize.toyland.pretraining.unclip import prior_network

D, L = 12, 6


@pytest.fixture(scope="module")
def model(tiny_sd):
    return models.load_model(str(tiny_sd), device="cpu", say=lambda line: None)


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    network = prior_network(3 * torch.randn(50, D) + 1, L=L, layers=2, heads=2, head=8)
    torch.nn.init.normal_(network.positional_embedding)
    torch.nn.init.normal_(network.prd_embedding)
    return unclip.Prior(network.eval())


def texts(rows, *, length=L):
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(L).expand(rows, -1) < length
    return unclip.Texts(torch.randn(rows, L, D, generator=g), mask, unclip.scaled(torch.randn(rows, D, generator=g)))


def test_embeddings_have_unit_deviation_whatever_their_length_was():
    e = unclip.scaled(torch.randn(500, 128) * 40)
    assert torch.allclose(e.norm(dim=1), torch.full((500,), 128**0.5)) and abs(e.std().item() - 1) < 0.02


def test_the_prior_is_causal_and_does_not_read_padding(prior):
    seen = {}
    hook = prior.network.norm_out.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    z, t, told = torch.randn(2, D), torch.tensor([10, 900]), texts(2, length=4)
    with torch.no_grad():
        out, before = prior.predict(z, t, told), seen["x"]
        later = prior.predict(z + 1, t, told)
        changed = seen["x"]
        padding = unclip.Texts(told.states + 5 * ~told.mask[..., None], told.mask, told.embeddings)
        same = prior.predict(z, t, padding)
    hook.remove()
    assert torch.equal(before[:, : L + 2], changed[:, : L + 2]) and not torch.allclose(out, later)  # z is the last but one
    assert torch.allclose(out, same, atol=1e-6)


def test_the_prior_draws_what_its_network_knows_and_each_seed_is_its_own(prior):
    e = prior.sample(texts(3), [rng.generator(0, "prior", k) for k in range(3)])
    told = texts(3)
    second = unclip.Texts(told.states[1:2], told.mask[1:2], told.embeddings[1:2])
    alone = prior.sample(second, [rng.generator(0, "prior", 1)])
    assert torch.allclose(e.norm(dim=1), torch.full((3,), D**0.5)) and torch.allclose(e[1:2], alone, atol=1e-5)
    mean = prior.network.clip_mean[0]
    assert torch.allclose(prior.normalised(mean[None]), torch.zeros(1, D), atol=1e-6)


def test_slerp_stays_on_the_sphere_at_even_angles():
    a, b = torch.randn(1, 8) * 3, torch.randn(1, 8)
    path = unclip.slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.allclose(path[:1], a, atol=1e-5) and torch.allclose(F.normalize(path[-1:]), F.normalize(b), atol=1e-5)
    assert torch.allclose(path.norm(dim=1), a.norm(dim=1).expand(5), atol=1e-5)
    steps = F.cosine_similarity(path[1:], path[:-1])
    assert torch.allclose(steps, steps[:1].expand(4), atol=1e-5)
    assert torch.allclose(unclip.slerp(a, a, torch.tensor([0.3])), a, atol=1e-5)


def test_states_of_a_prompt_draw_what_the_prompt_draws_to_the_bit(model):
    config = SamplingConfig("ddim", 2, 2.0)
    generators = [[rng.generator(0, "image", k) for k in range(2)] for _ in range(2)]
    texts = ["a dog", "a red hat"]
    words = sample_latents(model, texts, generators[0], config)
    states = sample_latents(model, ["", ""], generators[1], config, encoded=model.encode_prompts(texts)["text"])
    assert torch.equal(words, states)


def test_features_of_an_image_do_not_depend_on_its_neighbours_and_leave_no_hook(model):
    z0 = torch.randn(3, 4, 16, 16)
    rows = unclip.unet_features(model, z0)
    assert torch.allclose(rows[1:2], unclip.unet_features(model, z0[1:2]), atol=1e-4) and not torch.allclose(rows[0], rows[1])
    assert not any(part._forward_hooks for part in model.unet.modules())


def test_a_text_is_the_mean_of_its_tokens_and_not_of_its_padding(model):
    hidden, mask = unclip.hidden_states(model, ["a dog", "a photo of a dog"])
    assert mask.sum(1).tolist()[0] < mask.sum(1).tolist()[1] < mask.shape[1]
    pooled = unclip.mean_of_tokens(hidden, mask)
    assert torch.allclose(pooled[0], hidden[0, mask[0]].mean(0), atol=1e-6)
