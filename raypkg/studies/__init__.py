"""Sweeps: an order and a space → numbered trials, each a run of an experiment, on Ray Tune."""
