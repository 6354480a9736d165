"""What the loss and its diagnostics take of a training step of the built-in model.

    python -m bench.step [--batch 64] [--diagnose-every 50] [--rounds 21]

In turns: a whole step (encode, loss, backward, clip, optimiser), the loss alone (forward, backward
and statistics, as the loop calls it) on the step's embeddings, and one line of diagnostics, which a
run with --diagnose-every K pays every K steps. Medians; bi-DynamicSVR.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from supclap.batches import Epoch
from supclap.config import ModelConfig, TrainConfig
from supclap.corpus import load_corpus
from supclap.diagnose import Diagnosis
from supclap.model import SupclapModel
from supclap.ranks import Ranks
from supclap.step import backward, build_loss, build_optimizer, compute_loss
from supclap.synth import synthesise

from . import timer
from .machine import environment


def measure(batch_size: int, every: int, rounds: int) -> dict[str, float]:
    """Milliseconds, and shares of a step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        synthesise(out, clips=max(40, batch_size // 3), seed=0)
        corpus = load_corpus(out / "train.csv", 30.0)
    config = TrainConfig(data=out, out=out, svr="bi-dynamic", batch_size=batch_size)
    torch.manual_seed(0)
    model, ranks = SupclapModel(ModelConfig()), Ranks(torch.device("cpu"))
    model.audio.encoder.set_statistics(corpus.sample)
    criterion = build_loss(config, batch_size)
    optimizer = build_optimizer(config, model, criterion)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    batch = next(Epoch(corpus, model.text.encoder.tokenizer, batch_size).batches())

    def step() -> None:
        optimizer.zero_grad()
        backward(model, criterion, batch, None, ranks)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    rows = [
        x.detach().requires_grad_() for x in (model.audio(*batch.audio), model.text(*batch.text))
    ]

    def loss() -> None:
        compute_loss(model, criterion, *rows, batch.ids, ranks)[0].backward()

    def diagnose() -> None:
        Diagnosis(model, criterion, batch, None, ranks).finish()

    calls = {"step": step, "loss": loss, "diagnostics": diagnose}
    samplers = {name: timer.wall_sampler(call) for name, call in calls.items()}
    times_ms = timer.interleave(samplers, rounds)
    medians = {f"{name}_ms": statistics.median(times_ms[name]) for name in calls}
    shares = {
        "loss_share": medians["loss_ms"] / medians["step_ms"],
        "diagnostics_share": medians["diagnostics_ms"] / every / medians["step_ms"],
    }
    return medians | shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--diagnose-every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    measured = measure(args.batch, args.diagnose_every, args.rounds)
    print(json.dumps({**vars(args), **measured, "environment": environment()}, indent=2))


if __name__ == "__main__":
    main()
