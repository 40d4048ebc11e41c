"""Coreset selection: last-layer gradients, solvers, budgets, one rule a file, and selection while training goes on."""
