"""LiPT (PMLR 202:29130), reconstructed: models trained on disjoint shards, and merged."""
