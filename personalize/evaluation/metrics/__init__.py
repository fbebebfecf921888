"""Metrics: pictures and photos, embedded once  ->  one number per picture. Whoever calls one aggregates.

METRICS need no more than pictures and photos. DIV (`diversity`), DINO-fg (`foreground`) and what tells copies
(`copying`) also need prompts, masks or several photos, and are called by name.
"""

from personalize.evaluation.metrics.similarity import clip_i, clip_t, dino

METRICS = {"dino": dino, "clip_i": clip_i, "clip_t": clip_t}
