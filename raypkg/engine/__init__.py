"""One short training loop, its hooks, evaluation, costs and data shards; nothing here knows of Ray."""
