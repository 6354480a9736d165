"""Hangs a radius on the model it is trained with, so that the model's trainer finds it."""

from collections.abc import MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .radius import SavedRadius

NAME = "supclap_radius"
WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
"""They list the parameters of their `module` when they are made."""

Radius = TypeVar("Radius", bound=nn.Module)


def attach_radius(model: nn.Module, radius: Radius) -> Radius:
    """Make the radius a part of the model, and return it for the loss.

        radius = attach_radius(model, StaticRadius(1.0))  # before DDP, FSDP and the optimizer
        criterion = SVRLoss(radius, beta=1.0)

    It is the model's child `supclap_radius` then: `model.parameters()`, and with them the
    optimizer, DDP and FSDP, `model.state_dict()`, `.to()` and `.train()` reach it. The model
    computes what it did. Where a radius hangs already, that one is returned, with its trained
    value: a loss that is built anew calls this again, also with the model in its DDP, FSDP or
    torch.compile.

    Checkpoints: attach first, then load one that has the radius. One without it is loaded first
    (or with `strict=False`), and so is a model for inference from one that has it; or the model is
    saved after `detach_radius(model)`.

    DDP with find_unused_parameters=True, as some trainers set it, takes what its forward does not
    use for unused; a hook tells it that the loss uses the radius.

    Args:
        model: any module. In an nn.Sequential the radius hangs in a part that hands on what it
            gets; a SentenceTransformer saves and loads that part.
        radius: StaticRadius(), DynamicRadius(...) or another module; moved to the device of the
            model's first parameter.

    Raises:
        TypeError: not modules. ValueError: another kind of radius hangs on the model, or the model
            is wrapped already.
    """
    for name, module in (("model", model), ("radius", radius)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a module, got {type(module).__name__}")
    bare, wrapper = unwrapped(model)
    earlier = attached(bare)
    if isinstance(earlier, SavedRadius):
        radius.load_state_dict(earlier.state_dict())
        detach_radius(bare)
    elif earlier is not None:
        if kind(earlier) != kind(radius):
            raise ValueError(
                f"another radius hangs on this model, {described(earlier)}; got "
                f"{described(radius)}: detach_radius(model) first, before the optimizer is made"
            )
        return earlier
    if wrapper is not None:
        raise ValueError(
            f"the model is in {wrapper} already, which has listed its parameters and would leave "
            "the radius out: attach the radius first, and wrap the model then"
        )
    device = next((p.device for p in bare.parameters()), None)
    if device is not None and device.type != "meta":
        radius.to(device)
    bare.add_module(NAME, holder(bare, radius))
    bare.register_forward_hook(shown_to_ddp)
    return radius


def detach_radius(model: nn.Module) -> nn.Module | None:
    """Take the radius off the model, which then saves and loads as if it had none.

    Returns:
        The radius, or None where none hangs.
    """
    bare, _ = unwrapped(model)
    radius = attached(bare)
    if radius is not None:
        delattr(bare, NAME)
        for key, hook in list(bare._forward_hooks.items()):
            if hook is shown_to_ddp:
                del bare._forward_hooks[key]
    return radius


def shown_to_ddp(model: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: in a DDP that looks for unused parameters, outputs that depend on the radius,
    with a gradient of nothing. Their values are the same; elsewhere they are not touched."""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or not wrapper.find_unused_parameters or wrapper.static_graph:
        return None
    trained = [p for p in attached(model).parameters() if p.requires_grad]
    return dependent(output, trained) if trained and torch.is_grad_enabled() else None


def dependent(output: Any, parameters: list[nn.Parameter]) -> Any:
    if isinstance(output, Tensor):
        return Dependent.apply(output, *parameters) if output.requires_grad else output
    if isinstance(output, MutableMapping):
        for name, value in list(output.items()):
            output[name] = dependent(value, parameters)
    elif isinstance(output, tuple | list):
        items = [dependent(value, parameters) for value in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return output


class Dependent(torch.autograd.Function):
    """A tensor, with an edge of the graph to each parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], *[None] * ctx.count


class HandsOn(nn.Module):
    """A part of an nn.Sequential that holds the radius."""

    def __init__(self, radius: nn.Module) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, features: Any) -> Any:
        return features


def holder(model: nn.Module, radius: nn.Module) -> nn.Module:
    """What hangs on the model: the radius, or for a Sequential a part of it."""
    if not isinstance(model, nn.Sequential):
        return radius
    if any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__):
        from .integrations.sentence_transformers_part import RadiusPart

        return RadiusPart(radius)
    return HandsOn(radius)


def unwrapped(model: nn.Module) -> tuple[nn.Module, str | None]:
    """The model itself, and the name of what had listed its parameters, if anything."""
    wrapper = None
    while attached(model) is None:
        names = {cls.__name__ for cls in type(model).__mro__}
        wrappers = names & WRAPPERS
        if wrappers or "FSDPModule" in names:
            wrapper = next(iter(wrappers), "fully_shard")
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif wrappers or "DataParallel" in names:
            model = model.get_submodule("module")
        else:
            break
    return model, wrapper


def attached(model: nn.Module) -> Any:
    """The radius that hangs on this very module, or None."""
    child = model._modules.get(NAME)
    return child.radius if isinstance(model, nn.Sequential) and child is not None else child


def described(radius: nn.Module) -> str:
    # `fully_shard` makes a module one of a class of its own.
    return f"{type(radius).__name__.removeprefix('FSDP')}({radius.extra_repr()})"


def kind(radius: nn.Module) -> Any:
    """What two radii must agree in to stand for one another."""
    shapes = {name: tuple(value.shape) for name, value in radius.state_dict().items()}
    return described(radius), shapes
