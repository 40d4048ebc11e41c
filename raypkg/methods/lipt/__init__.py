"""LiPT (PMLR 202:29130), reconstructed: models trained on disjoint shards, then merged.

The registries stand apart from their entries in ``pretrain.py`` and ``merges.py``, so that names are checked before
PyTorch is imported.
"""

from raypkg.core.registry import Registry

pretraining = Registry(
    "pre-training", "raypkg.methods.lipt.pretrain", given=("samples", "workers"), decorator="pretraining"
)
merge = Registry("merge", "raypkg.methods.lipt.merges", given=("total", "gather"))
