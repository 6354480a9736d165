"""A run that can go on: everything the next step depends on, in one file.

`state.pt` is written as a whole or not at all, after the lines of the log it stands for; what the
log has beyond it is dropped on resuming. The order of the pairs and the crops need no state: they
are drawn from the seed, the epoch and the pair (batches.py). A finished run keeps its last state,
so that it can be extended.
"""

from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .corpus import Corpus
from .errors import UserError
from .files import write_whole
from .ranks import Ranks

STATE, FINISHED = "state.pt", "finished.json"
LAST = "finished.pt"
OWN = "queue"  # the part that is another one on every rank
SHOWN = 3  # clips of each kind that a difference names


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # steps done
    epoch: int = 1  # the epoch to go on in
    batch: int = 0  # its batches done
    best: float = -1.0  # mean R@1 of the checkpoint on the manifest that selects
    since: int = 0  # validations since then
    saved: str = "no checkpoint"  # which one is in model.safetensors


def random_state(device: torch.device) -> list[Any]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None]


def begin_from(run: Path) -> str:
    return f"begin a new run from it: --init {run}"


def is_finished(run: Path, epochs: int) -> bool:
    """Whether a run has ended and so many epochs would extend it; an error if they would not."""
    try:
        done = json.loads((run / FINISHED).read_text(encoding="utf-8")).get("epochs")
    except FileNotFoundError:
        return False
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {run / FINISHED}: {error}") from error
    begin = begin_from(run)
    if not isinstance(done, int) or not any((run / name).exists() for name in (STATE, LAST)):
        raise UserError(
            f"{run} is finished, by a version that kept no state to go on from; {begin}"
        )
    if epochs <= done:
        raise UserError(f"{run} is finished; go on with more than its --epochs {done}, or {begin}")
    return True


def numbered(hashes: list[list[Any]]) -> dict[str, Any]:
    """Checksums by name; several manifests may have files of one name."""
    found: dict[str, Any] = {}
    for name, checksum in hashes:
        place = next(n for n in itertools.count(1) if f"{name} ({n})" not in found)
        found[f"{name} ({place})"] = checksum
    first = {name.removesuffix(" (1)"): value for name, value in found.items()}
    return first


def difference(before: list[list[Any]], corpus: Corpus) -> str:
    """Returns how the clips and captions of a manifest differ from those of a run, "" if not."""
    now = corpus.hashes
    if before == now:
        return ""
    old, new = numbered(before), numbered(now)
    kinds = {
        "gone": [clip for clip in old if clip not in new],
        "new": [clip for clip in new if clip not in old],
        "with other captions": [clip for clip in old if new.get(clip, old[clip]) != old[clip]],
    }
    parts = [
        f"{len(clips)} {kind} ({', '.join(clips[:SHOWN])}{', ...' * (len(clips) > SHOWN)})"
        for kind, clips in kinds.items()
        if clips
    ]
    return "; ".join(parts) or "the same clips in another order"


def save_state(
    run: Path,
    parts: dict[str, Any],
    corpora: dict[str, Corpus],
    progress: Progress,
    ranks: Ranks,
    device: torch.device,
) -> None:
    """Collects the state of every rank; the first one writes it. `parts`: modules and optimisers by
    name; `corpora`: by the flags of their manifests."""
    randoms = ranks.each(random_state(device))
    own = ranks.each(parts[OWN].state_dict()) if OWN in parts else []
    if ranks.rank == 0:
        state = {name: part.state_dict() for name, part in parts.items() if name != OWN}
        state |= {OWN: own} if OWN in parts else {}
        state["pairs"] = {name: corpus.hashes for name, corpus in corpora.items()}
        data = corpora["data"].fingerprint
        state |= {"data": data, "progress": asdict(progress), "randoms": randoms}
        write_whole(run / STATE, lambda path: torch.save(state, path))


def give_dimensions(optimizer: torch.optim.Optimizer) -> None:
    """Gives the moments of a parameter that had no dimensions when saved its shape of today."""
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state and state[name].ndim == 0:
                state[name] = state[name].reshape(parameter.shape)


def load_state(
    run: Path, parts: dict[str, Any], corpora: dict[str, Corpus], ranks: Ranks, device: torch.device
) -> Progress:
    """Brings `parts` and the random numbers back to where `save_state` was called, and a finished
    run to its end. The corpora, by flag, must be those it began with."""
    finished = (run / FINISHED).exists() and not (run / STATE).exists()
    path = run / (LAST if finished else STATE)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            one = name != OWN or len(state[name]) != ranks.count
            part.load_state_dict(state[name] if one else state[name][ranks.rank])
            if isinstance(part, torch.optim.Optimizer):
                give_dimensions(part)
        progress, randoms = Progress(**state["progress"]), state["randoms"]
        same = corpora["data"].fits(state["data"])
    except FileNotFoundError:
        raise UserError(f"{run} has no {path.name} to go on from") from None
    except (
        OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.PickleError,
    ) as error:  # fmt: skip
        raise UserError(f"cannot read the run's state {path}: {error!r}") from error
    for name, corpus in corpora.items():
        before = state.get("pairs", {}).get(name)  # none in a state of an earlier version
        changes = "" if before is None else difference(before, corpus)
        if changes or (name == "data" and not same):
            which = "its manifest" if name == "data" else f"its manifest of --{name}"
            more = f": {changes}" if changes else f", or are read otherwise now; {begin_from(run)}"
            raise UserError(f"{run}: the clips or captions of {which} have changed since{more}")
    if len(randoms) != ranks.count:
        raise UserError(f"{run} was trained by {len(randoms)} processes; resume it with as many")
    cpu, cuda = randoms[ranks.rank]
    torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda)
    return progress
