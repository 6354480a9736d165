"""What of the encoders is trained: all of them, nothing, the last layers, or low-rank adapters."""

from __future__ import annotations

import importlib

from torch import nn

from .config import TrainConfig
from .errors import UserError


def add_adapters(encoder: nn.Module, rank: int) -> None:
    """Puts adapters (LoRA, by peft) beside every linear layer."""
    peft = importlib.import_module("peft")
    encoder = getattr(encoder, "model", encoder)  # peft asks one that has settings for more
    layers = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    peft.inject_adapter_in_model(settings, encoder)


def last_layers(encoder: nn.Module, count: int) -> tuple[str, ...]:
    """Returns the beginnings of the names of the last layers' parameters. The layers are those of
    the largest list, such as `encoder.layer`; stages, if these hold blocks (Swin)."""
    lists = [(n, m) for n, m in encoder.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UserError(f"--train-last {count}: an encoder has no layers")
    name, layers = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    if len(layers) < count:
        raise UserError(f"--train-last {count}: an encoder has {len(layers)} layers")
    return tuple(f"{name}.{n}." for n in range(len(layers) - count, len(layers)))


def choose_trained(config: TrainConfig, encoders: dict[str, nn.Module]) -> None:
    """Sets which parameters of the encoders, by the names of their towers, get a gradient. What an
    encoder was built without one stays so."""
    for tower, encoder in encoders.items():
        parameters = dict(encoder.named_parameters())
        built = frozenset(name for name, p in parameters.items() if p.requires_grad)
        built = encoder.__dict__.setdefault("built_to_train", built)
        adapters = {name for name in parameters if ".lora_" in name}
        last = None if config.train_last is None else last_layers(encoder, config.train_last)
        for name, p in parameters.items():
            trained = name in built and tower not in config.frozen
            trained &= not adapters or name in adapters
            trained &= last is None or name.startswith(last)
            p.requires_grad_(trained)
