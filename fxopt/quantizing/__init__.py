"""What the pass fake_quantize and the export of its result are made of."""
