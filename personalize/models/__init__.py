"""Bases: what encodes, predicts and decodes."""
