"""Momentum from merge to merge: what a round moved the model by is one step of an outer optimiser."""

from .soup import State


def outer_step(start: State, merged: State, velocity: State, momentum: float) -> tuple[State, State]:
    """Return the weights to go on with, and the velocity v, by Nesterov's rule.

        d = merged − start        v ← μ v + d        w = start + d + μ v

    as in local SGD with outer momentum (SlowMo, arXiv:1910.00643) and DiLoCo (arXiv:2311.08105), whose outer rate is 1
    here. With μ = 0 the merged weights themselves go on.

    Args:
        start: the weights that the round began with.
        merged: those that it ended with.
        velocity: of the round before; empty before the first.
        momentum: μ.

    >>> import torch
    >>> w, v = outer_step({"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}, {}, 0.5)
    >>> w["w"], v["w"]
    (tensor([4.]), tensor([2.]))
    """
    if not momentum:
        return merged, {}
    moved = {name: merged[name] - start[name] for name in start}
    if velocity:
        moved = {name: momentum * velocity[name] + d for name, d in moved.items()}
    ahead = {name: merged[name] + momentum * moved[name] for name in start}
    return ahead, moved
