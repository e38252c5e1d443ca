"""Families of dense parents: what each calls its tensors, and how it is read."""
