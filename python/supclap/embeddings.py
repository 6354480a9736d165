"""Unit vectors of clips and captions, by a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .batches import pad_features
from .corpus import Corpus, ReadOptions, check_any_left, decode_clips, problems_of
from .loader import load_items
from .manifest import Clip
from .model import SupclapModel, Tower, evaluating
from .progress import Bar


@dataclass(frozen=True)
class EmbedOptions(ReadOptions):
    """How clips are read and encoded: what every command on a run shares."""

    device: str | torch.device = "cpu"
    batch_size: int = 64  # clips or captions encoded at once


DEFAULTS = EmbedOptions()
Encode = Callable[..., Tensor]
SLICE = 1024  # clips that are decoded before they are encoded


def encoded(
    encode: Encode, batches: Iterable[tuple[Tensor, ...]], device: torch.device
) -> Iterator[Tensor]:
    """Yields what `encode` makes of each batch, on the CPU: [B, W]."""
    for batch in batches:
        yield encode(*(x.to(device) for x in batch)).cpu()


def padded_features(clips: range, corpus: Corpus) -> tuple[Tensor, ...]:
    return pad_features([corpus.features(clip) for clip in clips])


def clip_batches(corpus: Corpus, size: int, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """Yields the clips of a corpus as their encoder takes them, or its outputs, if it is frozen."""
    if corpus.audio_outputs is not None:
        return ((part,) for part in corpus.audio_outputs.split(size))
    workers = 0 if corpus.kept is not None else workers
    clips = range(len(corpus.clips))
    parts = [clips[start : start + size] for start in clips[::size]]
    return load_items(partial(padded_features, corpus=corpus), parts, workers)


def encode_texts(
    encode: Encode, model: SupclapModel, captions: list[str], languages: list[str], size: int
) -> Tensor:
    """Returns what `encode` makes of captions, on the CPU: [M, W]. Equal captions are encoded once:
    else they would be padded to another length, rounded otherwise, and no longer tie."""
    pairs, tokenizer = list(zip(captions, languages, strict=True)), model.text.encoder.tokenizer
    row_of = {pair: row for row, pair in enumerate(dict.fromkeys(pairs))}
    unique = list(row_of)
    parts = [unique[start : start + size] for start in range(0, len(unique), size)]
    batches = (tokenizer(*map(list, zip(*part, strict=True))) for part in parts)
    vectors = torch.cat(list(encoded(encode, batches, model.log_scale.device)))
    return vectors[[row_of[pair] for pair in pairs]]


def inferring(model: SupclapModel, tower: Tower) -> Encode:
    """Returns what gives unit vectors; training may go on between two batches."""

    def encode(*batch: Tensor) -> Tensor:
        with evaluating(model):
            return tower(*batch)

    return encode


def embed_audio(
    model: SupclapModel, corpus: Corpus, batch_size: int = 64, workers: int = 0
) -> Iterator[Tensor]:
    """Yields the unit vectors of some clips at a time, on the CPU: [at most batch_size, D]."""
    batches = clip_batches(corpus, batch_size, workers)
    return encoded(inferring(model, model.audio), batches, model.log_scale.device)


def embed_features(model: SupclapModel, features: list[Tensor], batch_size: int = 64) -> Tensor:
    """Returns the unit vectors of clips by their features [F_c, M], on the CPU: [N, D]."""
    parts = [features[n : n + batch_size] for n in range(0, len(features), batch_size)]
    encode, device = inferring(model, model.audio), model.log_scale.device
    vectors = encoded(encode, map(pad_features, parts), device)
    return torch.cat([torch.empty(0, model.width), *vectors])


def embed_clips(
    model: SupclapModel, clips: list[Clip], manifest: Path, options: EmbedOptions
) -> tuple[Tensor, list[Clip], list[str]]:
    """Returns the unit vectors [N, D] of the clips that can be used, these clips, and what is wrong
    with the others. Features of SLICE clips are in memory at a time."""
    front_end, seconds = model.audio.encoder.front_end, model.seconds
    if options.cache == "off":
        options = replace(options, cache="memory")  # decoded once
    vectors, used, bad = [], list[Clip](), list[str]()
    with Bar(total=len(clips), desc=f"embedding {manifest.name}") as bar:
        for start in range(0, len(clips), SLICE):
            some = clips[start : start + SLICE]
            decoded = decode_clips(some, front_end, seconds, options, bar)
            bad += problems_of(some, decoded, manifest, options.skip_bad_audio)
            features = [x.features for x in decoded if x.features is not None]
            vectors.append(embed_features(model, features, options.batch_size))
            used += [clip for clip, x in zip(some, decoded, strict=True) if not x.problem]
    check_any_left(clips, bad, manifest)
    return torch.cat(vectors), used, bad


def embed_text(
    model: SupclapModel, captions: list[str], languages: list[str], batch_size: int = 64
) -> Tensor:
    """Returns the unit vectors of captions, on the CPU: [M, D]."""
    return encode_texts(inferring(model, model.text), model, captions, languages, batch_size)


def embed_corpus(
    model: SupclapModel, corpus: Corpus, batch_size: int = 64, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns the unit vectors of all M captions and N clips, on the CPU: [M, D], [N, D]."""
    if corpus.text_outputs is None:
        text = embed_text(model, corpus.captions, corpus.languages, batch_size)
    else:
        text = inferring(model, model.text)(corpus.text_outputs.to(model.log_scale.device)).cpu()
    return text, torch.cat(list(embed_audio(model, corpus, batch_size, workers)))


def encode_once(
    model: SupclapModel, corpus: Corpus, frozen: tuple[str, ...], workers: int = 0
) -> Corpus:
    """Returns the corpus with what the frozen encoders make of it: of all captions, and of all
    clips unless training takes another part of some each time."""
    audio, text = None, None
    with evaluating(model, inference=False):
        if "audio" in frozen and not corpus.longer.any():
            batches = clip_batches(corpus, DEFAULTS.batch_size, workers)
            audio = torch.cat(list(encoded(model.audio.encode, batches, model.log_scale.device)))
        if "text" in frozen:
            texts = (corpus.captions, corpus.languages)
            text = encode_texts(model.text.encode, model, *texts, DEFAULTS.batch_size)
    return replace(corpus, audio_outputs=audio, text_outputs=text)
