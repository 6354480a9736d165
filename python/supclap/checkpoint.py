"""A run that can go on: everything the next step depends on, in one file.

`state.pt` is written as a whole or not at all, after the lines of the log it stands for; what the
log has beyond it is dropped on resuming. The order of the pairs and the crops need no state: they
are drawn from the seed, the epoch and the pair (data.py).
"""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .config import UserError
from .files import write_whole
from .ranks import Ranks

STATE, FINISHED = "state.pt", "finished.json"


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # steps done
    epoch: int = 1  # the epoch to go on in
    batch: int = 0  # its batches done
    best: float = -1.0  # mean R@1 of the checkpoint on the manifest that selects
    saved: str = "no checkpoint"  # which one is in model.safetensors


def random_state(device: torch.device) -> list[Any]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None]


def save_state(
    run: Path,
    parts: dict[str, Any],
    data: str,
    progress: Progress,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """`parts`: modules and optimisers by name; `data`: the corpus' fingerprint. Called on every
    rank; the first one writes."""
    randoms = ranks.each(random_state(device))
    if ranks.rank == 0:
        whole = {name: part.state_dict() for name, part in parts.items()}
        whole |= {"data": data, "progress": asdict(progress), "randoms": randoms}
        write_whole(run / STATE, lambda path: torch.save(whole, path))


def give_dimensions(optimizer: torch.optim.Optimizer) -> None:
    """Moments of a parameter that had no dimensions when they were saved get its shape of today."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state and state[name].ndim == 0:
                state[name] = state[name].reshape(parameter.shape)


def load_state(
    run: Path, parts: dict[str, Any], data: str, ranks: Ranks, device: torch.device
) -> Progress:
    """Bring `parts` and the random numbers back to where `save_state` was called."""
    path = run / STATE
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(whole[name])
            if isinstance(part, torch.optim.Optimizer):
                give_dimensions(part)
        progress, randoms = Progress(**whole["progress"]), whole["randoms"]
        same = whole["data"] == data
    except FileNotFoundError:
        raise UserError(f"{run} has no {path.name} to go on from") from None
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, pickle.PickleError) as error:
        raise UserError(f"cannot read the run's state {path}: {error}") from error
    if not same:
        raise UserError(f"{run}: the clips or captions of its manifest have changed since")
    if len(randoms) != ranks.count:
        raise UserError(f"{run} was trained by {len(randoms)} processes; resume it with as many")
    cpu, cuda = randoms[ranks.rank]
    torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda)
    return progress
