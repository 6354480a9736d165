"""How large a reproduction is."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ModelConfig
from ..phrases import CODES


@dataclass(frozen=True)
class Preset:
    """How large, how long, how often."""

    clips: int
    epochs: int
    batch_size: int
    seeds: int  # of the main comparisons
    few: int  # seeds of every sweep
    languages: tuple[str, ...] = CODES
    captions: int = 1
    lr: float = 1e-3
    rates: tuple[float, ...] = (0.5, 2.0, 4.0)  # of InfoNCE, times lr
    other_rates: tuple[float, ...] = (0.1, 4.0)  # of readings that could be the default
    long: int = 4  # times the epochs, to see where training comes to rest
    inits: tuple[float, ...] = (0.1, 0.5, 1.0)
    batch_sizes: tuple[int, ...] = (64, 128)
    alphas: tuple[float, ...] = (0.5, 2.0)
    noises: tuple[int, ...] = (20, 40)  # percent of the captions
    validate_every: int = 100
    diagnose_every: int = 50
    device: str = "cpu"
    model: ModelConfig = ModelConfig(width=64, embed_dim=64)
    main_only: bool = False  # the main comparisons alone, of recordings


PRESETS = {
    "smoke": Preset(
        clips=60, epochs=2, batch_size=16, seeds=2, few=1, languages=("eng", "zho"), long=2,
        rates=(2.0,), other_rates=(4.0,), inits=(0.5,), batch_sizes=(8,), alphas=(0.5,),
        noises=(40,), validate_every=4, diagnose_every=2,
        model=ModelConfig(width=32, heads=2, embed_dim=32),
    ),
    "cpu": Preset(clips=1000, epochs=2, batch_size=24, seeds=10, few=5),
    "real": Preset(clips=0, epochs=8, batch_size=24, seeds=10, few=10, other_rates=(),
                   main_only=True),
    "gpu": Preset(
        clips=10_000, epochs=10, batch_size=24, seeds=10, few=5, captions=5,
        batch_sizes=(256, 4096), noises=(10, 20, 40), validate_every=1000, diagnose_every=500,
        device="cuda",
        model=ModelConfig(width=256, heads=8, audio_layers=4, text_layers=4, embed_dim=256),
    ),
}  # fmt: skip
