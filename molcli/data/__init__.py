"""Text and tokens: from documents on the disk to packed rows."""
