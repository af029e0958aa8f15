"""Floor 1: files in and out, prompt hygiene and batches."""
