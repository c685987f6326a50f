"""``tools/replay``: a trace of requests through an arena and an L2, and what each tier hit."""
