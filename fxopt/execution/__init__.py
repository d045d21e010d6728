"""Programs run inside the one buffer that was planned for them."""
