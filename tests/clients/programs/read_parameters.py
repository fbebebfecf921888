"""What sd-parsers finds in a PNG. Job: image."""

import json
import sys

from sd_parsers import ParserManager

found = ParserManager().parse(json.loads(sys.argv[1])["image"])
sampler = found.samplers[0]
print(json.dumps({
    "generator": str(found.generator), "prompts": [prompt.value for prompt in found.prompts],
    "negative": [prompt.value for prompt in found.negative_prompts], "sampler": sampler.name,
    "parameters": {key: str(value) for key, value in sampler.parameters.items()},
    "metadata": {str(key): str(value) for key, value in found.metadata.items()},
}))  # fmt: skip
