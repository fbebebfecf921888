"""What every room uses: errors, files, settings, the recipe, run folders, the terminal."""
