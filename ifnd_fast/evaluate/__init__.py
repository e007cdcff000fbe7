"""How good a trained encoder is, measured on features or by training on top of it."""
