"""Pure functions on tensors: no files, no modules, no global state."""
