"""First weights that another training left: which of them a model takes, and which it draws anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.engine.hooks import Hook, Results
from raypkg.engine.run import Run

FIRST = "checkpoints/first.safetensors"  # of an unfinished run: its source may change, or be deleted
HEAD = "head."  # begins the names of the last layer's parameters
NAMED = 3  # names that a line tells, of however many


class Fit(NamedTuple):
    """What a model takes of the tensors of another.

    Attributes:
        taken: those that fit, by name.
        anew: the names of its own that have none.
        unused: the names of the other's that it does not have.
    """

    taken: Mapping[str, Tensor]
    anew: Sequence[str]
    unused: Sequence[str]


def fitted(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> Fit:
    """Return which tensors a model takes: those of its names and shapes; a head for other classes is drawn anew.

    Args:
        model: that takes them, as it is.
        tensors: of another model, by name.
        source: names them in the error.

    Raises:
        UserError: none fits but for a head, or a shape differs elsewhere.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> fit = fitted(model, {"0.weight": model[0].weight, "other": model[0].bias}, "a.safetensors")
    >>> list(fit.taken), fit.anew, fit.unused
    (['0.weight'], ['0.bias', '1.weight', '1.bias'], ['other'])
    """
    own = model.state_dict()
    shared = [name for name in own if name in tensors]
    taken = {name: tensors[name] for name in shared if tensors[name].shape == own[name].shape}
    features = [name for name in own if not name.startswith(HEAD)] or list(own)
    differing = [name for name in shared if name not in taken and not _of_other_classes(name, own, tensors)]
    if set(features).isdisjoint(shared) or not (taken or differing):
        raise UserError(
            f"train.from = {source}: no tensor fits this model: there it has {_some(list(tensors))}, here"
            f" {_some(list(own))}"
        )
    if differing:
        name, *_ = differing
        there, here = (list(state[name].shape) for state in (tensors, own))
        raise UserError(f"train.from = {source}: {name} is {there} there and {here} in this model")
    return Fit(
        taken=taken,
        anew=[name for name in own if name not in taken],
        unused=[name for name in tensors if name not in own],
    )


def _of_other_classes(name: str, own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Say whether a parameter is of heads that differ in the number of classes alone."""
    return name.startswith(HEAD) and own[name].shape[1:] == other[name].shape[1:]


class FirstWeights(Hook):
    """Begins with the weights of another training.

    Args:
        tensors: of its model, by name.
        source: where they come from, for what it tells.
    """

    priority = -10  # before first masks are drawn, which may look at the weights

    def __init__(self, tensors: Mapping[str, Tensor], source: str):
        self.tensors = tensors
        self.source = source
        self.finding = ""

    def on_start(self, run: Run) -> None:
        """Overwrite the weights that fit.

        Raises:
            UserError: none does, or the model is another one.
        """
        fit = fitted(run.model, self.tensors, self.source)
        run.model.load_state_dict(fit.taken, strict=False)
        self.tensors = {}  # they are in the model now
        self.finding = _told(fit, self.source)

    def results(self, run: Run) -> Results:
        """Return what was taken, in a line."""
        return Results(findings=[self.finding])


def _told(fit: Fit, source: str) -> str:
    """Say in a line where the first weights come from."""
    line = f"first weights: {len(fit.taken)} tensors from {source}"
    if fit.anew:
        line += f"; drawn anew: {_some(fit.anew)}"
    if fit.unused:
        line += f"; without a place here: {_some(fit.unused)}"
    return line


def _some(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = len(names) - NAMED
    told = ", ".join(names[:NAMED])
    return f"{told} and {more} more" if more > 0 else told or "none"
