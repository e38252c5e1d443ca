"""Predict parameters, FLOPs, memory, time and KL before anything is computed."""
