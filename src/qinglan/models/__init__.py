"""Floor 1: causal language models, chat rendering, heads and the sampler."""
