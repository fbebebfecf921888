"""Metrics, scores with intervals, the choice of a checkpoint, the report."""
