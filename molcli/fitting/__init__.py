"""Fit thin blocks and mixers to what a dense layer computes."""
