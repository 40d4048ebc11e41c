"""Data sources by kind of sample: ``load(root, *, split, cache, …) → Split``."""

from raypkg.core.registry import Registry

dataset = Registry("dataset", "raypkg.data.sources", given=("split", "cache", "registered"))
