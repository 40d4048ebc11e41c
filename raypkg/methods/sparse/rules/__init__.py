"""Rules of dynamic sparse training, one file for each name: where to begin, what to drop, what to grow, and where.

    @initial(name)         masks(model, density, *, rng, batch) → Masks
    @drop(name)            score(weight) → of a layer's active weights [k]; the lowest go, ∞ stays
    @growth(name)          score(weight, *, gradient, momentum, rng) → like the layer; the highest inactive ones come
    @redistribution(name)  share(weight, *, momentum) → of a layer's active weights [k]; its part of what is grown

Keywords that a rule does not need it leaves out, and they are not computed.
"""

from raypkg.core.config import Named
from raypkg.core.errors import UserError
from raypkg.core.registry import Registry
from raypkg.methods.sparse.settings import Sparsity

_PACKAGE = "raypkg.methods.sparse.rules"
initial = Registry("sparse initialisation", _PACKAGE, given=("rng", "batch"))
drop = Registry("drop rule", _PACKAGE)
growth = Registry("growth rule", _PACKAGE, given=("gradient", "momentum", "rng"))
redistribution = Registry("redistribution", _PACKAGE, given=("momentum",))


def check_rules(settings: Sparsity) -> None:
    """Refuse unknown rules and wrong options.

    Raises:
        UserError: what is wrong.
    """
    chosen: tuple[tuple[Registry, Named | None], ...] = (
        (initial, settings.sparse_init),
        (drop, settings.drop),
        (growth, settings.growth),
        (redistribution, settings.redistribution),
    )
    for rules, rule in chosen:
        if rule:
            rules[rule.name].options(rule.options)
    if getattr(settings, "compute", "masked") == "sparse" and (needy := momentum_rules(settings)):
        raise UserError(f"compute = sparse has no dense gradient at every step, which {needy[0]} needs")


def momentum_rules(settings: Sparsity) -> list[str]:
    """Return those settings, as ``name = value``, whose rules need the dense gradient of every step."""
    chosen = {"growth": (growth, settings.growth), "redistribution": (redistribution, settings.redistribution)}
    return [
        f"{setting} = {rule.name}"
        for setting, (rules, rule) in chosen.items()
        if rule and "momentum" in rules[rule.name].declares
    ]
