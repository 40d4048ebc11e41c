"""Sparse networks: densities per layer and masks with exact counts."""
