"""Models by name; every model is ``head(features(x))`` with a linear head, or a language model."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from raypkg.core.errors import UserError
from raypkg.core.memory import check_memory
from raypkg.core.registry import Registry, argument
from raypkg.core.seeds import derive

if TYPE_CHECKING:
    from torch import nn

    from .classifier import Classifier
    from .language import LanguageModel

model = Registry("model", "raypkg.models", given=("variant", "registered"))


def build_model(
    name: str, shape: tuple[int, ...], num_classes: int, *, seed: int, options: Mapping[str, Any] | None = None
) -> "Classifier | LanguageModel":
    """Build a model for samples of shape (C, H, W), (D,) or (L, V); its weights are a function of the seed alone.

    The name is a registered one, ``torchvision:resnet18``, or a user's ``package.module:function``, which is called as
    ``function(shape, num_classes, **options)`` and returns any ``nn.Module`` that ends in an ``nn.Linear``.

    Raises:
        UserError: unknown name or option, a shape that the model cannot take, more parameters than fit this machine's
            memory, a module without a linear head, or one that trains nothing.

    >>> build_model("linear", (1, 8, 8), 10, seed=0).head
    Linear(in_features=64, out_features=10, bias=True)
    """
    import torch

    from .classifier import checked

    entry = model[name]
    shape = tuple(shape)
    signature = inspect.signature(entry.function)
    if entry.name != name and "variant" not in signature.parameters:
        raise UserError(f"model {name!r}: {entry.name!r} takes nothing after a colon")
    try:
        signature.bind(shape, num_classes, **dict.fromkeys(entry.declares))
    except TypeError:
        raise UserError(f"model {name!r} must be callable as function(shape, num_classes), not {signature}") from None

    build = partial(entry, shape, num_classes, variant=argument(name), options=options)
    if name in model:  # sizes of torchvision's models are fixed, the user's own code is called once
        parameters = list(outline(name, shape, num_classes, options).parameters())
        count = sum(parameter.numel() for parameter in parameters)
        size = sum(parameter.nbytes * (3 if parameter.requires_grad else 1) for parameter in parameters)
        what = f"model {name!r} of {count:,} parameters, with gradients and momentum"
        check_memory(what, size, "choose a smaller one")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "init"))  # torch.manual_seed would seed the GPUs as well
        built = build()
        if hasattr(built, "checked"):  # a language model, whose module other runs need not import
            return built.checked(name, shape)
        return checked(built, name, shape, num_classes)


def outline(
    name: str, shape: tuple[int, ...], num_classes: int, options: Mapping[str, Any] | None = None
) -> "nn.Module":
    """Build a registered model on the meta device, which has shapes and allocates nothing."""
    import torch

    with torch.device("meta"):
        built: nn.Module = model[name](shape, num_classes, variant=argument(name), options=options)
        return built


def tokenizer_of(name: str) -> str:
    """Return the name or folder of the tokenizer that a model needs; "" if any will do.

    >>> tokenizer_of("transformers:roberta-base"), tokenizer_of("transformer")
    ('roberta-base', '')
    """
    own = getattr(model[name].function, "has_tokenizer", False)
    return argument(name) if own else ""
