"""Networks that had a normalisation of activations and have none any more."""
