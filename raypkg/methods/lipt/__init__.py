"""LiPT (PMLR 202:29130), reconstructed: sparse models trained on disjoint shards and merged once."""
