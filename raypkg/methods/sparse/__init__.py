"""Sparse training: SET, RigL, sparse momentum, ITOP, static masks and gradual pruning.

The registries stand apart from their entries in ``rules.py``, so that names are checked before PyTorch is imported.
"""

from raypkg.core.registry import Registry

_RULES = "raypkg.methods.sparse.rules"
initial = Registry("sparse initialisation", _RULES, given=("rng", "batch"), decorator="initial")
drop = Registry("drop rule", _RULES, decorator="drop")
growth = Registry("growth rule", _RULES, given=("gradient", "momentum", "rng"), decorator="growth")
redistribution = Registry("redistribution", _RULES, given=("momentum",))
