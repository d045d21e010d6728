"""How :func:`fxopt.run_pass` proves what a pass promises."""
