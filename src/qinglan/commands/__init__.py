"""Floor 4: the commands of single stages, of data and of the built-in world, each a thin wrapper."""
