"""The training loop: one optimizer step, checkpoints, what a run says."""
