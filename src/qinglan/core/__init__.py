"""Floor 0: records, configuration, run folder, randomness, device, files."""
