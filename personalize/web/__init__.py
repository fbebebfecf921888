"""The page: it reads folders, and starts and stops commands. Nothing is computed here, and nothing is lost when it closes."""
