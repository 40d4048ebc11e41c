"""LiPT (PMLR 202:29130), reconstructed: sparse models on disjoint shards, merged once."""
