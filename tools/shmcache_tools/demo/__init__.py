"""``tools/demo``: an engine's main job over one arena and an L2, with real processes and a report at the end."""
