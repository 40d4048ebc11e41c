"""Coreset selection methods, one file each: ``select(view, budget, *, rng, …) → Coreset``."""

from raypkg.core.registry import Registry

coreset = Registry("coreset method", "raypkg.methods.coresets", given=("rng", "valid"))
