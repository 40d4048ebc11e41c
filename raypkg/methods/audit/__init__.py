"""Audit: the training samples that a trained head would be better without."""
