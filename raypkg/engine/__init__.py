"""The training loop, its hooks, evaluation, costs and data shards. Independent of Ray."""

from raypkg.core.registry import Registry

hook = Registry("hook", "raypkg.methods.*.hook", given=("job", "worker", "samples"))  # imports no torch
