"""Memory and time of a run, before a weight is read."""
