"""Unit vectors of clips and captions, by a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .batches import Tokenizer, pad_features
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


def padded_features(clips: range, corpus: Corpus) -> tuple[Tensor, ...]:
    return pad_features([corpus.features(clip) for clip in clips])


def over_audio(
    encode: Encode, corpus: Corpus, device: torch.device, batch_size: int, workers: int
) -> Iterator[Tensor]:
    """Yields what `encode` makes of some clips at a time, on the CPU: [at most batch_size, W]."""
    workers = 0 if corpus.kept is not None else workers
    clips = range(len(corpus.clips))
    parts = [clips[start : start + batch_size] for start in clips[::batch_size]]
    for batch in load_items(partial(padded_features, corpus=corpus), parts, workers):
        yield encode(*(x.to(device) for x in batch)).cpu()


def over_text(
    encode: Encode,
    tokenizer: Tokenizer,
    captions: list[str],
    languages: list[str],
    device: torch.device,
    batch_size: int,
) -> Tensor:
    """Returns what `encode` makes of captions, on the CPU: [M, W]. Equal captions are encoded once:
    else they would be padded to another length, rounded otherwise, and no longer tie."""
    pairs, vectors = list(zip(captions, languages, strict=True)), []
    row_of = {pair: row for row, pair in enumerate(dict.fromkeys(pairs))}
    unique = list(row_of)
    for start in range(0, len(unique), batch_size):
        texts, codes = zip(*unique[start : start + batch_size], strict=True)
        tokens = tokenizer(list(texts), list(codes))
        vectors.append(encode(*(x.to(device) for x in tokens)).cpu())
    return torch.cat(vectors)[[row_of[pair] for pair in pairs]]


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
    device, encode = model.log_scale.device, inferring(model, model.audio)
    if corpus.audio_outputs is None:
        yield from over_audio(encode, corpus, device, batch_size, workers)
    else:
        for part in corpus.audio_outputs.split(batch_size):
            yield encode(part.to(device)).cpu()


def embed_features(model: SupclapModel, features: list[Tensor], batch_size: int = 64) -> Tensor:
    """Returns the unit vectors of clips by their features [F_c, M], on the CPU: [N, D]."""
    device, encode = model.log_scale.device, inferring(model, model.audio)
    parts = [features[n : n + batch_size] for n in range(0, len(features), batch_size)]
    vectors = [encode(*(x.to(device) for x in pad_features(part))).cpu() for part in parts]
    return torch.cat([torch.empty(0, model.width), *vectors])


def embed_clips(
    model: SupclapModel, clips: list[Clip], manifest: Path, options: EmbedOptions
) -> tuple[Tensor, list[Clip], list[str]]:
    """Returns the unit vectors [N, D] of the clips that can be used, these clips, and what is wrong
    with the others. Features of SLICE clips are in memory at a time."""
    front_end = model.audio.encoder.front_end
    seconds = min(model.config.max_seconds, front_end.seconds)
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
    device, tokenizer = model.log_scale.device, model.text.encoder.tokenizer
    encode = inferring(model, model.text)
    return over_text(encode, tokenizer, captions, languages, device, batch_size)


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
    device, audio, text = model.log_scale.device, None, None
    with evaluating(model, inference=False):
        if "audio" in frozen and not corpus.longer.any():
            audio = torch.cat(list(over_audio(model.audio.encode, corpus, device, 64, workers)))
        if "text" in frozen:
            encode, tokenizer = model.text.encode, model.text.encoder.tokenizer
            text = over_text(encode, tokenizer, corpus.captions, corpus.languages, device, 64)
    return replace(corpus, audio_outputs=audio, text_outputs=text)
