"""Metrics: pictures and photos, embedded once  ->  one number per picture. Whoever calls one aggregates."""

from personalize.metrics.similarity import clip_i, clip_t, dino

METRICS = {"dino": dino, "clip_i": clip_i, "clip_t": clip_t}
