"""What `supclap embed` takes beyond decoding the clips and running the model.

    python -m bench.embedding [--clips 1000] [--encoder builtin] [--threads 2] [--out FILE]

In turns, on a part of the clips each: all of it, decoding and features alone, and the audio tower
alone, on features that are there. Clips are ten seconds of stereo FLAC at 44.1 kHz.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
from supclap.audio import load_first, open_audio
from supclap.config import ModelConfig
from supclap.embeddings import EmbedOptions, embed_clips, embed_features
from supclap.manifest import Clip
from supclap.model import SupclapModel

from .machine import arguments, environment, write_json

SECONDS, RATE = 10, 44_100


def write_clips(folder: Path, count: int) -> list[Clip]:
    """Noise of another colour and rhythm in each."""
    rng, clips = np.random.default_rng(0), []
    for n in range(count):
        noise = rng.standard_normal((SECONDS * RATE // 4, 2)).repeat(1 + n % 4, axis=0)
        rhythm = np.abs(np.sin(np.linspace(0, 3 + n % 50, SECONDS * RATE)))[:, None]
        wave = 0.1 * np.resize(noise, (SECONDS * RATE, 2)) * rhythm
        path = folder / f"{n}.flac"
        soundfile.write(path, wave, RATE)
        clips.append(Clip(path.name, path, ()))
    return clips


def measure(clips: list[Clip], encoder: str, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = SupclapModel(ModelConfig(audio_encoder=encoder)).eval()
    front_end = model.audio.encoder.front_end
    rounds = min(rounds, len(clips))

    def decoded(part: list[Clip]) -> list[torch.Tensor]:
        return [
            front_end(load_first(open_audio(clip), model.seconds, front_end.sample_rate)[1])
            for clip in part
        ]

    taken: dict[str, list[float]] = {"embed": [], "decode": [], "model": []}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        taken[name].append(time.perf_counter() - start)

    for n in range(rounds):
        part = clips[n::rounds]
        features = decoded(part)
        ways: list[tuple[str, Callable[[], object]]] = [
            ("embed", partial(embed_clips, model, part, Path(), EmbedOptions())),
            ("decode", partial(decoded, part)),
            ("model", partial(embed_features, model, features)),
        ]
        for name, work in ways[n % 3 :] + ways[: n % 3]:
            timed(name, work)
    parts = zip(*taken.values(), strict=True)
    ratio = statistics.median(whole / (decode + encode) for whole, decode, encode in parts)
    totals = {f"{name}_s": round(sum(times), 2) for name, times in taken.items()}
    return {**totals, "ratio": round(ratio, 3)}


def main() -> None:
    parser = arguments("bench.embedding", __doc__, 10)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--encoder", default="builtin")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        clips = write_clips(Path(folder), chosen.clips)
        result = {"clips": chosen.clips, "encoder": chosen.encoder, "threads": chosen.threads}
        result |= measure(clips, chosen.encoder, chosen.rounds)
    print(result)
    if chosen.out:
        write_json(chosen.out, {"machine": environment(), **result})


if __name__ == "__main__":
    main()
