"""How :func:`fxopt.capture` follows a forward pass and writes it down."""
