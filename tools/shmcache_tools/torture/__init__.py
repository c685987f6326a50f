"""``tools/torture``: processes that are killed and stopped while they work, and a check of all that they saw."""
