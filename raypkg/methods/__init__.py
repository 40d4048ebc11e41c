"""The mathematics of the methods: pure PyTorch, usable without anything above."""
