"""Embeddings for use elsewhere, and a search over sounds: of a folder, or by saved embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .embeddings import DEFAULTS, EmbedOptions, embed_clips, embed_text
from .errors import UserError
from .files import check_folder_of
from .folders import EXTENSIONS, is_audio
from .interface import Embedder
from .labels import is_labelled, read_clips_of
from .languages import LANGUAGE
from .manifest import Clip
from .model import checksum, load_model, selection_note
from .saved import Index, Saved, best_of, check_ending
from .tables import read_text

Hits = list[tuple[float, str]]
"""Cosines and files, best first."""


def clips_of(folder: Path, option: str) -> list[Clip]:
    """Returns every sound of a folder, searched in depth."""
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if is_audio(path.name))
    if not paths:
        raise UserError(f"{option} {folder}: it holds no audio ({', '.join(EXTENSIONS)})")
    return [Clip(path.relative_to(folder).as_posix(), path, ()) for path in paths]


def sentences_of(path: Path) -> list[str]:
    """Returns the lines of a file that are not empty."""
    sentences = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not sentences:
        raise UserError(f"--data {path}: no line of it has a sentence")
    return sentences


def embed(
    run: Path,
    data: Path,
    out: Path,
    only: str | None = None,
    language: str = LANGUAGE,
    options: EmbedOptions = DEFAULTS,
) -> tuple[Saved, list[str]]:
    """Writes the unit vectors of a manifest, of labelled clips, of a folder of sounds, or of the
    lines of a .txt.

    `only`: "audio" or "text"; None: what there is. Returns what was written and what could not be
    read.
    """
    check_folder_of(out, "--out")
    is_text, is_audio = data.suffix.lower() == ".txt", data.is_dir() or is_labelled(data)
    if only == ("audio" if is_text else "text") and (is_text or is_audio):
        raise UserError(f"--only {only}: {data} has none")
    only = "text" if is_text else "audio" if is_audio else only
    check_ending(out, both=only is None)
    saved, skipped, clips, labels = Saved(), list[str](), list[Clip](), list[str]()
    if is_text:
        saved.captions = sentences_of(data)
        saved.languages = [language] * len(saved.captions)
    elif data.is_dir() and not is_labelled(data):
        clips = clips_of(data, "--data")
    else:
        clips, labels = read_clips_of(data)
    label_of = {id(clip): label for clip, label in zip(clips, labels, strict=False)}
    model = load_model(run).to(options.device)
    if only != "text":
        saved.audio, clips, skipped = embed_clips(model, clips, data, options)
        saved.files = [clip.name for clip in clips]
        saved.labels = [label_of[id(clip)] for clip in clips if label_of]
    if only != "audio":
        if not is_text:
            saved.captions = [caption for clip in clips for caption in clip.captions]
            saved.languages = [language for clip in clips for language in clip.languages]
        saved.text = embed_text(model, saved.captions, saved.languages, options.batch_size)
    if only is None:
        counts = torch.tensor([len(clip.captions) for clip in clips])
        saved.clip_of = torch.repeat_interleave(torch.arange(len(clips)), counts)
    saved.note = {"run": str(run), "weights": checksum(model)} | selection_note(run)
    saved.write(out)
    return saved, skipped


def search(
    run: Path,
    query: str | Path,
    audio: Path | None = None,
    top: int = 10,
    language: str = LANGUAGE,
    options: EmbedOptions = DEFAULTS,
    index: Path | None = None,
) -> tuple[Hits, list[str]]:
    """Returns the clips nearest to the query, a sentence or the path of a sound, and what could not
    be read.

    `audio`: a folder, which is embedded now; or `index`: what `embed` wrote.
    """
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    if isinstance(query, str) and not query.strip():
        raise UserError("the query is empty")
    if (audio is None) == (index is None):
        raise UserError("name a folder by --audio, or saved embeddings by --index")
    clips = [] if audio is None else clips_of(audio, "--audio")
    saved = None if index is None else Index(index)
    model = Embedder(run, options)
    if saved is not None and saved.width != model.width:
        raise UserError(
            f"--index {index}: it has {saved.width} dimensions and {run} {model.width}: another "
            "run wrote it"
        )
    if saved is not None and saved.weights and saved.weights != checksum(model.model):
        raise UserError(
            f"--index {index}: other weights wrote it than those of {run}; write it again: "
            f"supclap embed {run} --data FOLDER --out {index}"
        )
    embedded = model.embed_audio(query) if isinstance(query, Path) else None
    vector = (model.embed_text(str(query), language) if embedded is None else embedded)[0]
    if saved is not None:
        return saved.nearest(vector, top), []
    assert audio is not None
    options = replace(options, skip_bad_audio=True)
    vectors, used, skipped = embed_clips(model.model, clips, audio, options)
    return best_of(vectors @ vector, [clip.name for clip in used], top), skipped
