"""Which blocks a token visits."""
