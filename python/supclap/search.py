"""Embeddings for use elsewhere, and a search over a folder of audio files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from .corpus import read_as_heard
from .embeddings import DEFAULTS, EmbedOptions, embed_audio, embed_corpus, embed_text
from .errors import UserError
from .files import check_folder_of, write_whole
from .folders import EXTENSIONS, is_audio
from .languages import LANGUAGE
from .manifest import Clip, read_manifest
from .model import load_model, selection_note


def embed(run: Path, data: Path, out: Path, options: EmbedOptions = DEFAULTS) -> tuple[int, int]:
    """Writes unit vectors to a safetensors file: audio [N, D], text [M, D], clip_of [M], and as
    metadata the `files` and `captions` (JSON). Returns N and M."""
    check_folder_of(out, "--out")
    model = load_model(run).to(options.device)
    corpus = read_as_heard(model, read_manifest(data), data, options)
    text, audio = embed_corpus(model, corpus, options.batch_size, options.workers)
    tensors = {"audio": audio, "text": text, "clip_of": corpus.clip_of}
    files = json.dumps([clip.name for clip in corpus.clips])
    note = {"files": files, "captions": json.dumps(corpus.captions), "run": str(run)}
    note |= selection_note(run)
    write_whole(out, lambda path: save_file(tensors, path, note))
    return len(audio), len(text)


def search(
    run: Path,
    query: str,
    audio: Path,
    top: int = 10,
    language: str = LANGUAGE,
    options: EmbedOptions = DEFAULTS,
) -> tuple[list[tuple[float, str]], list[str]]:
    """Returns the clips of a folder nearest to the query, as (cosine, file), best first, and what
    could not be read."""
    if not audio.is_dir():
        raise UserError(f"--audio {audio}: no such folder")
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    if not query.strip():
        raise UserError("the query is empty")
    paths = sorted(path for path in audio.rglob("*") if is_audio(path.name))
    if not paths:
        raise UserError(f"--audio {audio}: it holds no audio ({', '.join(EXTENSIONS)})")
    model = load_model(run).to(options.device)
    clips = [Clip(path.relative_to(audio).as_posix(), path, ()) for path in paths]
    corpus = read_as_heard(model, clips, audio, replace(options, skip_bad_audio=True))
    vector = embed_text(model, [query], [language])[0]
    parts = embed_audio(model, corpus, options.batch_size, options.workers)
    scores = torch.cat([part @ vector for part in parts])
    best = scores.argsort(descending=True, stable=True)[:top].tolist()
    return [(scores[n].item(), corpus.clips[n].name) for n in best], corpus.skipped
