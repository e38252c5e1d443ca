"""Files and folders on disk: read lazily, written completely or not at all."""
