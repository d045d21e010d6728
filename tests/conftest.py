"""Its place puts ``tests/`` on the path, so that tests share helpers (``from capture.checks …``)."""
