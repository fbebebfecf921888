"""Files of other programs, read and written: single-file checkpoints, LoRA files, embedding files.

Nothing here builds a model: a format is a map between names. No reader trusts a file's names or its header.
"""
