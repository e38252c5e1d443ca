"""Predict parameters, operations, memory, time and quality before any work."""
