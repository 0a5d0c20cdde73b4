"""A run directory, its stages one after the other, and a plan of them."""
