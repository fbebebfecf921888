"""One module a command, each with `run`. They never import each other: they meet in folders on disk, and in `api`."""
