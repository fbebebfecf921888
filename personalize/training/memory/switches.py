"""Settings of a run that save memory, for `plan` and for a run that does not fit."""

from personalize.common.optimizers import OPTIMIZERS
from personalize.common.recipe import Recipe
from personalize.common.recipe_sections import ADAPTERS
from personalize.models.devices import choose_device


def memory_switches(recipe: Recipe) -> list[tuple[str, dict]]:
    """What saves memory, in the order of what it costs: (as for --set, values of train)."""
    train = recipe.train
    adapters = set(train.methods) & set(ADAPTERS)
    frozen = "full" not in train.methods and not train.quantize and choose_device(recipe.device).type == "cuda"
    lighter = OPTIMIZERS[train.optimizer].lighter
    plain = next((name for name, row in OPTIMIZERS.items() if row.lighter == train.optimizer), train.optimizer)
    images = train.batch + (train.prior_batch or train.batch)
    switches = [
        (not train.gradient_checkpointing, "gradient_checkpointing=true", {"gradient_checkpointing": True}),
        (lighter and not adapters, f"optimizer={lighter}", {"optimizer": lighter}),
        (train.accumulate < images, f"accumulate={images}", {"accumulate": images}),
        (train.ema, "ema=0", {"ema": 0.0}),
        (frozen and not train.offload and train.engine == "eager", "offload=true", {"offload": True}),
        (adapters and not train.quantize, "quantize=8bit", {"quantize": "8bit"}),
        (adapters and train.quantize != "4bit", "quantize=4bit", {"quantize": "4bit"}),
        ("full" in train.methods, "methods=lora", {"methods": ("lora",), "optimizer": plain}),
    ]
    return [(f"train.{text}", values) for saves, text, values in switches if saves]
