"""One short training loop, its hooks, evaluation, costs and data shards; nothing here knows of Ray."""

from raypkg.core.registry import Registry

hook = Registry("hook", "raypkg.methods.*.hook", given=("job", "worker", "samples"))
