"""Each example with its trainer: the radius is trained, saved, resumed, the same on all ranks."""

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from ranks import run

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "open_clip_loop": ("open_clip", "open_clip_train"),
    "laion_clap_loop": ("laion_clap",),
    "transformers_trainer": ("transformers", "accelerate"),
    "sentence_transformers_trainer": ("sentence_transformers", "accelerate", "datasets"),
    "lightning_module": ("lightning",),
    "accelerate_loop": ("accelerate",),
    "ddp": (),
    "cached": (),
}
ALL_ROWS = ("ddp", "accelerate_loop")
"""Examples whose loss over two ranks is that of all rows: as in one process."""


def example(name: str) -> Any:
    missing = [p for p in PACKAGES.get(name, ()) if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f"examples/{name}.py needs {', '.join(missing)}")
    return importlib.import_module(name)


def radius_of(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters, whole."""
    named = {n: p for n, p in model.named_parameters() if "supclap_radius" in n}
    return {n: getattr(p, "full_tensor", lambda p=p: p)().detach() for n, p in named.items()}


def is_trained(model: nn.Module, optimizer: Any) -> bool:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = [p for n, p in model.named_parameters() if "supclap_radius" in n]
    return bool(named) and all(id(p) in known for p in named)


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir(exist_ok=True)
    return parent / name


def anew(train: Any, *given: Any) -> Any:
    """As in a process of its own: accelerate has one state for each."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    return train(*given)


def straight_and_resumed(train: Any, where: Path) -> list[dict[str, Tensor]]:
    """The radius after 2 steps, after 4, and after 2 and 2 of a resumed run."""
    half, optimizer = anew(train, folder(where, "resumed"), 2)
    assert is_trained(half, optimizer)
    first = radius_of(half)
    whole, _ = anew(train, folder(where, "straight"), 4)
    again, optimizer = anew(train, where / "resumed", 4, True)
    assert is_trained(again, optimizer)
    return [first, radius_of(whole), radius_of(again)]


def equal(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_each_example_is_listed():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {
        "toy",
        "stamps",
        "own_encoder",
    }
    assert scripts == {*PACKAGES, "fsdp2"}
    table = (ROOT / "examples" / "README.md").read_text()
    for name in scripts:
        assert f"[{name}.py]({name}.py)" in table
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 100 and "# SVR" in text


@pytest.mark.parametrize("name", PACKAGES)
def test_the_radius_is_trained_saved_and_resumed(name, tmp_path):
    first, whole, again = straight_and_resumed(example(name).train, tmp_path)
    assert not equal(first, whole) and equal(again, whole)


def on_ranks(rank: int, world: int, names: list[str], where: Path) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    found = {}
    for name in names:
        train = importlib.import_module(name).train
        found[name] = straight_and_resumed(
            train, folder(where, name) if rank == 0 else where / name
        )
    return found


def test_two_ranks(tmp_path):
    """The same radius on both, resumed as well; and the single process' where the loss is."""
    names = [name for name in (*ALL_ROWS, "fsdp2") if not missing(name)]
    for name in names:
        for part in ("straight", "resumed"):
            (tmp_path / name / part).mkdir(parents=True)
    copies = run(2, on_ranks, names, tmp_path)
    for name in names:
        (first, whole, again), others = copies[0][name], copies[1][name]
        assert all(equal(x, y) for x, y in zip(copies[0][name], others, strict=True)), name
        assert not equal(first, whole) and equal(again, whole), name
        alone = "accelerate_loop" if name == "fsdp2" else name
        if missing(alone):
            continue
        model, _ = anew(example(alone).train, folder(tmp_path, f"{name} alone"), 4)
        for x, y in zip(whole.values(), radius_of(model).values(), strict=True):
            assert float((x - y).abs().max()) <= 1e-4 * float(1e-2 + y.abs().max()), name


def missing(name: str) -> bool:
    return any(importlib.util.find_spec(p) is None for p in PACKAGES.get(name, ()))


def many_steps(rank: int, world: int, where: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("ddp", "fsdp2"):
            importlib.import_module(name).train(where, 105)
    return [str(warning.message) for warning in caught]


def test_no_warning_of_a_radius_that_is_sharded_and_trained(tmp_path):
    """FSDP2 hands out a tensor whose version does not count."""
    for messages in run(2, many_steps, tmp_path):
        assert not [text for text in messages if "never changed" in text]
