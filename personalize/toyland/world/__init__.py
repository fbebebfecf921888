"""What Toyland shows: a seed -> a scene, its caption, its image and mask."""
