"""Embeddings for use elsewhere, and a search over a folder of audio files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .config import UserError
from .data import load_clips
from .evaluate import corpus_for, embed_audio, embed_corpus, embed_text
from .files import check_folder_of, write_whole
from .manifest import EXTENSIONS, LANGUAGE, Clip
from .model import chosen_on_test, load_model


def embed(
    run: Path,
    data: Path,
    out: Path,
    device: str | torch.device = "cpu",
    skip_bad_audio: bool = False,
    *,
    rows: int = 64,
    cache: str = "memory",
    workers: int = 0,
) -> tuple[int, int]:
    """Write unit vectors to a safetensors file: audio [N, D], text [M, D], clip_of [M], and as
    metadata the `files` and `captions` (JSON). Returns N and M."""
    check_folder_of(out, "--out")
    model = load_model(run).to(device)
    corpus = corpus_for(model, data, skip_bad_audio, cache=cache, workers=workers)
    text, audio = embed_corpus(model, corpus, rows, workers)
    tensors = {"audio": audio, "text": text, "clip_of": corpus.clip_of}
    said = {"files": [clip.name for clip in corpus.clips], "captions": corpus.captions}
    note = {name: json.dumps(value) for name, value in said.items()} | {"run": str(run)}
    note |= {"selected_on": "test"} if chosen_on_test(run) else {}
    write_whole(out, lambda path: save_file(tensors, path, note))
    return len(audio), len(text)


def search(
    run: Path,
    query: str,
    audio: Path,
    top: int = 10,
    language: str = LANGUAGE,
    device: str | torch.device = "cpu",
    *,
    rows: int = 64,
    cache: str = "memory",
    workers: int = 0,
) -> tuple[list[tuple[float, str]], list[str]]:
    """The clips of a folder nearest to the query, as (cosine, file), best first; and what could not
    be read."""
    if not audio.is_dir():
        raise UserError(f"--audio {audio}: no such folder")
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    if not query.strip():
        raise UserError("the query is empty")
    paths = sorted(path for path in audio.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise UserError(f"--audio {audio}: it holds no audio ({', '.join(EXTENSIONS)})")
    model = load_model(run).to(device)
    clips = [Clip(path.relative_to(audio).as_posix(), path, ()) for path in paths]
    corpus = load_clips(
        clips, audio, model.config.max_seconds, skip_bad_audio=True,
        front_end=model.audio.encoder.front_end, cache=cache, workers=workers,
    )  # fmt: skip
    wanted = embed_text(model, [query], [language])[0]
    scores = torch.cat([part @ wanted for part in embed_audio(model, corpus, rows, workers)])
    best = scores.argsort(descending=True, stable=True)[:top].tolist()
    return [(scores[n].item(), corpus.clips[n].name) for n in best], corpus.skipped
