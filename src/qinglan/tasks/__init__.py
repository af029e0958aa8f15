"""Floor 3: the built-in world, its answer key and its base models."""
