"""Data sources, one file each, and the Split they all return."""

from raypkg.core.registry import Registry

dataset = Registry("dataset", "raypkg.data", given=("split", "cache"))
