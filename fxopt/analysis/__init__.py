"""Facts about programs: what they cost."""
