"""Photos -> checked, cropped tensors; class images; the batch of a step; rare tokens."""
