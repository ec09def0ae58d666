"""Scripts that measure what the README and the closing notes claim."""
