"""Decoding with caches of growing and of fixed size, and CUDA graphs."""
