"""Files of other programs: single-file checkpoints, LoRA and embedding files, by name and shape only.

Nothing here builds a model: a format is a map of names, and its reader trusts neither the file's names nor its header.
"""
