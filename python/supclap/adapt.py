"""What of the encoders is trained: all of them, nothing, the last layers, or low-rank adapters."""

from __future__ import annotations

import importlib

from torch import nn

from .config import TrainConfig
from .errors import UserError


def add_adapters(encoder: nn.Module, rank: int) -> bool:
    """Puts adapters (LoRA, by peft) beside every linear layer of a model of transformers; returns
    False for an encoder that is none."""
    if not hasattr(encoder, "model"):
        return False
    peft = importlib.import_module("peft")
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    peft.inject_adapter_in_model(settings, encoder.model)
    return True


def train_last_layers(encoder: nn.Module, count: int, option: str) -> None:
    """Leaves nothing but the last layers to train, and what comes after them."""
    lists = [(n, m) for n, m in encoder.named_modules() if isinstance(m, nn.ModuleList)]
    lists = [(n, m) for n, m in lists if "conv" not in n]  # what makes frames of a wave
    name, layers = max(lists, key=lambda found: len(found[1]), default=("", nn.ModuleList()))
    if len(layers) < count:
        raise UserError(f"{option} {count}: an encoder has {len(layers)} layers")
    parameters = list(encoder.named_parameters())
    trained = tuple(f"{name}.{n}." for n in range(len(layers) - count, len(layers)))
    last = max(n for n, (p, _) in enumerate(parameters) if p.startswith(f"{name}."))
    for n, (parameter, p) in enumerate(parameters):
        p.requires_grad_(n > last or parameter.startswith(trained))


def choose_trained(config: TrainConfig, towers: dict[str, nn.Module]) -> None:
    """Sets which parameters of the encoders, by the names of their towers, get a gradient."""
    for name, encoder in towers.items():
        adapters = [n for n, _ in encoder.named_parameters() if ".lora_" in n]
        encoder.requires_grad_(name not in config.frozen and not adapters)
        if name in config.frozen:
            continue
        for adapter in adapters:
            encoder.get_parameter(adapter).requires_grad_(True)
        if config.train_last is not None and not adapters:
            train_last_layers(encoder, config.train_last, "--train-last")
