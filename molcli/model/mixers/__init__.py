"""Sequence mixers of a block."""
