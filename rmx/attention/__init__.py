"""Sequences end to end in one row, the attention that keeps them apart, and that of decoding on a CPU."""
