"""Rules of dynamic sparse training, one file for each name: where to begin, what to drop, what to grow, and where.

    @initial(name)         masks(model, density, *, rng, batch) → Masks
    @drop(name)            score(weight) → of a layer's active weights [k]; the lowest go, ∞ stays
    @growth(name)          score(weight, *, gradient, momentum, rng) → like the layer; the highest inactive ones come
    @redistribution(name)  share(weight, *, momentum) → of a layer's active weights [k]; its part of what is grown

Keywords that a rule does not need it leaves out, and they are not computed.
"""

from raypkg.core.registry import Registry

_PACKAGE = "raypkg.methods.sparse.rules"
initial = Registry("sparse initialisation", _PACKAGE, given=("rng", "batch"))
drop = Registry("drop rule", _PACKAGE)
growth = Registry("growth rule", _PACKAGE, given=("gradient", "momentum", "rng"))
redistribution = Registry("redistribution", _PACKAGE, given=("momentum",))
