"""AGENT (arXiv:2301.03573): adaptive gradient correction by a snapshot of the model."""
