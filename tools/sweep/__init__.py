"""The parts of ``tools/zoo_sweep.py``: which models, what is asked of each, workers, tables."""
