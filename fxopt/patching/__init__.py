"""Parts of a network that run tile by tile."""
