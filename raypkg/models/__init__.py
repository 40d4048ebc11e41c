"""Model families, one file each; every model is ``head(features(x))`` with a linear head."""

from raypkg.core.registry import Registry

model = Registry("model", "raypkg.models", given=("variant",))
