"""Everything that knows of Ray: sessions, Ray Train launches, shard actors."""
