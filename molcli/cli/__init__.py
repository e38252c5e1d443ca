"""Commands: thin, typed, and the only place that joins stages."""
