"""Floor 2: losses, advantages and the training loops."""
