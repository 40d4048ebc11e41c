"""Everything that knows of Ray: the session, launches on Ray Train, shards on actors, trials on Ray Tune."""
