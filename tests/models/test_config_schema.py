"""Every field of the libraries' configs is known here: as a kind of value, or as one that is refused."""

import inspect

import pytest

from personalize.models import config_schema
from personalize.models.lazy_imports import lazy_imports

with lazy_imports():
    from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel, UNet2DModel
    from transformers import CLIPTextConfig, PretrainedConfig


@pytest.mark.parametrize(
    "kind, table",
    [
        (UNet2DConditionModel, config_schema.UNET),
        (AutoencoderKL, config_schema.VAE),
        (PriorTransformer, config_schema.PRIOR),
    ],
    ids=["unet", "vae", "prior"],
)
def test_every_field_of_the_librarys_config_is_a_row_and_its_default_is_allowed(kind, table):
    parameters = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    assert len(parameters) > 14 and parameters.keys() <= table.fields.keys()
    for name, default in parameters.items():
        plain = list(default) if isinstance(default, tuple) else default
        assert table.fields[name].allows(plain) or (name == "sample_size" and default is None), (name, default)


def test_every_field_of_an_upscalers_config_is_a_row():
    fields = inspect.signature(UNet2DModel.__init__).parameters.keys() - {"self"}
    assert fields <= config_schema.UPSCALER.fields.keys() and "add_attention" in fields


def test_every_field_of_a_text_encoders_config_is_a_row():
    ours = inspect.signature(CLIPTextConfig.__init__).parameters.keys() - inspect.signature(PretrainedConfig).parameters.keys()
    assert ours - {"self", "kwargs"} <= config_schema.TEXT_ENCODER.fields.keys() and "hidden_act" in ours
