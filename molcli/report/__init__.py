"""Everything that draws: one module per subject, built from `tables`, `html` and `charts`."""
