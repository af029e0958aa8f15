"""Floor 2: who looks at a student's work and gives feedback."""
