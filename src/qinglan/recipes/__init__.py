"""Floor 4: the published systems, each told top to bottom in one file."""
