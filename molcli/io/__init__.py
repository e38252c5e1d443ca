"""Reading parents and text, writing checkpoints."""
