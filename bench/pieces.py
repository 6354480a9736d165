"""What a training step of the built-in model gains where clips differ in length.

    python -m bench.pieces [--batch 64] [--threads 1] [--rounds 21] [--out FILE]

In turns: a whole step (encode, loss, backward, clip, optimiser) that encodes the batch in pieces of
similar length, and one that pads every row to the longest. Clips are log-uniform between 0.3 and 30
seconds; a batch is padded to about 4.7 times what is real; captions have 10 to 100 bytes.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from supclap import pieces
from supclap.audio import N_MELS
from supclap.batches import Batch, pad_features
from supclap.config import ModelConfig, TrainConfig
from supclap.model import SupclapModel
from supclap.ranks import Ranks
from supclap.step import backward, build_loss, build_optimizer

from . import timer
from .machine import arguments, environment, write_json

CUT = pieces.pieces_of


def make_batch(model: SupclapModel, size: int, seed: int = 0) -> tuple[Batch, float]:
    """A batch, and how many frames it has for each real one."""
    rng = np.random.default_rng(seed)
    frames = np.exp(rng.uniform(np.log(30), np.log(3000), size)).astype(int)
    features = [torch.from_numpy(rng.normal(-40, 10, (n, N_MELS))).half() for n in frames]
    captions = ["a" * n for n in rng.integers(10, 100, size)]
    text = model.text.encoder.tokenizer(captions, ["eng"] * size)
    padded = size * frames.max() / frames.sum()
    return Batch(pad_features(features), text, torch.arange(size)), float(padded)


def measure(size: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    config = TrainConfig(data=Path(), out=Path(), svr="bi-dynamic", batch_size=size)
    model, ranks = SupclapModel(ModelConfig()), Ranks(torch.device("cpu"))
    criterion = build_loss(config, size)
    optimizer = build_optimizer(config, model, criterion)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    batch, padded = make_batch(model, size)

    def step(cut: Callable[[list[int]], list[list[int]]]) -> None:
        pieces.pieces_of = cut
        optimizer.zero_grad()
        backward(model, criterion, batch, None, ranks)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def whole(lengths: list[int]) -> list[list[int]]:
        return [list(range(len(lengths)))]

    ways = {"pieces": CUT, "whole": whole}
    samplers = {name: timer.wall_sampler(partial(step, cut)) for name, cut in ways.items()}
    times_ms = timer.interleave(samplers, rounds)
    pairs = zip(times_ms["whole"], times_ms["pieces"], strict=True)
    medians = {f"{name}_ms": round(statistics.median(times_ms[name]), 1) for name in ways}
    faster = statistics.median(slow / fast for slow, fast in pairs)
    return {"padded_over_real": round(padded, 2), **medians, "faster": round(faster, 2)}


def main() -> None:
    parser = arguments("bench.pieces", __doc__, 21)
    parser.add_argument("--batch", type=int, default=64)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    result = {"batch": chosen.batch, "threads": chosen.threads}
    result |= measure(chosen.batch, chosen.rounds)
    print(result)
    if chosen.out:
        write_json(chosen.out, {"machine": environment(), **result})


if __name__ == "__main__":
    main()
