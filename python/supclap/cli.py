"""The `supclap` command."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import MOVABLE, build_config, flag, read_config
from .errors import UserError, explained
from .parser import build_parser

ON_TEST = "NOTE: this checkpoint was selected on a test set"


def train(config: Path | None, recipe: str | None, resume: Path | None, **settings: Any) -> None:
    from .train import train

    if resume is None:
        train(build_config(settings, config, recipe))
        return
    flags = [flag(name) for name in settings if name not in MOVABLE]
    flags += ["--config"] * bool(config) + ["--recipe"] * bool(recipe)
    if flags:
        raise UserError(
            f"--resume goes on with the settings of {resume}/config.json; drop {', '.join(flags)}"
        )
    train(replace(read_config(resume), **settings), resume=True)


def check(manifests: list[Path], workers: int | None) -> int:
    from .check import check, check_splits

    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    every = []
    for manifest in manifests:
        lines, problems = check(manifest, workers)
        every += problems
        print("\n".join([f"{manifest}:"] * (len(manifests) > 1) + lines))
    if len(manifests) > 1 and not every:
        every = check_splits(manifests)
    counted = f"{len(every)} problem{'s' * (len(every) != 1)}"
    print("\n".join([*every, counted]) if every else "no problems")
    return 1 if every else 0


def language_of(option: str, text: str) -> str:
    """Returns the code of a language that the command line names."""
    from .languages import language_code

    try:
        return language_code(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def embed_options(batch_size: int, threads: int | None = None, **options: Any) -> Any:
    """Checks what every command on a run shares, and sets the device and the threads."""
    from .embeddings import EmbedOptions
    from .ranks import choose_device, set_threads

    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    if options.get("workers", 0) < 0:
        raise UserError(f"--workers must not be negative, got {options['workers']}")
    set_threads(threads)
    device = choose_device(options.pop("device", "auto"))
    return EmbedOptions(device=device, batch_size=batch_size, **options)


def print_skipped(skipped: list[str]) -> None:
    if skipped:
        print(f"skipped {len(skipped)} bad audio files:")
        print("\n".join(f"  {reason}" for reason in skipped))


def evaluate(run: Path, data: list[Path], json: Path | None, **shared: Any) -> None:
    from .evaluate import RULE, chance_of, evaluate_run, table
    from .files import check_folder_of, write_json

    if json is not None:
        check_folder_of(json, "--json")
    options, metrics_of = embed_options(**shared), {}
    for manifest in data:
        metrics, corpus = evaluate_run(run, manifest, options)
        metrics_of[str(manifest)] = metrics
        print_skipped(corpus.skipped)
        print(f"{manifest}: {len(corpus.clips)} clips, {len(corpus.captions)} captions, in %")
        rows = {f"{run} {code}": of_code for code, of_code in metrics.get("languages", {}).items()}
        mean = f"{run} mean of {len(rows)} languages" if rows else str(run)
        print(table({**rows, mean: metrics, "chance": chance_of(corpus)}))
        for way, name in (("t2a", "text to audio"), ("a2t", "audio to text")):
            print(f"median rank, {name}: {metrics[way]['median_rank']:g}")
        if "selected_on" in metrics:
            print(ON_TEST)
    print(f"rule: {RULE}")
    if json is not None:
        write_json(json, {"rule": RULE} | (metrics if len(data) == 1 else metrics_of))


def zeroshot(
    run: Path, data: Path, json: Path | None, template: list[str] | None, lang: str, **shared: Any
) -> None:
    from .files import check_folder_of, write_json
    from .zeroshot import classify_run

    if json is not None:
        check_folder_of(json, "--json")
    language = language_of("--lang", lang)
    numbers = classify_run(run, data, template, language, embed_options(**shared))
    print_skipped(numbers["skipped"])
    print(f"{data}: {numbers['clips']} clips, {numbers['classes']} classes, in %")
    for name in ("accuracy", "top5", "mean_class_accuracy", "mean_fold_accuracy"):
        if name in numbers:
            print(f"{name:<20}{100 * numbers[name]:8.2f}")
    print(f"{'chance':<20}{100 / numbers['classes']:8.2f}")
    print(f"templates: {', '.join(numbers['templates'])}")
    if "selected_on" in numbers:
        print(ON_TEST)
    print(f"rule: {numbers['rule']}")
    if json is not None:
        write_json(json, numbers)


def embed(run: Path, data: Path, out: Path, only: str | None, lang: str, **shared: Any) -> None:
    from .search import embed

    language = language_of("--lang", lang)
    saved, skipped = embed(run, data, out, only, language, embed_options(**shared))
    print_skipped(skipped)
    print(f"{len(saved.files)} clips and {len(saved.captions)} captions are in {out}")


def search(
    run: Path,
    query: str | None,
    like: Path | None,
    audio: Path | None,
    index: Path | None,
    top: int,
    lang: str,
    json: Path | None,
    **shared: Any,
) -> None:
    from .files import check_folder_of, write_json
    from .model import selection_note
    from .search import search

    if json is not None:
        check_folder_of(json, "--json")
    if (query is None) == (like is None):
        raise UserError("search for a sentence, or for what sounds --like a file")
    asked = query if like is None else like
    assert asked is not None
    language, options = language_of("--lang", lang), embed_options(**shared)
    hits, skipped = search(run, asked, audio, top, language, options, index)
    print_skipped(skipped)
    if json is not None:
        write_json(json, [{"cosine": score, "file": name} for score, name in hits])
    print("rank  cosine  file")
    for rank, (score, name) in enumerate(hits, 1):
        print(f"{rank:4d}  {score:6.3f}  {name}")
    if selection_note(run):
        print(ON_TEST)


def export(run: Path, to: str, out: Path) -> None:
    from .model import selection_note

    if to == "hub":
        from .exports.folder import export_folder as export
    else:
        from .exports.onnx import export_onnx as export
    print("\n".join(export(run, out)))
    if selection_note(run):
        print(ON_TEST)


def plot(runs: list[Path], out: Path) -> None:
    from .plot import plot_runs

    alone = len({run.name for run in runs}) == len(runs)
    plot_runs({run.name if alone else str(run): run for run in runs}, out)
    print(f"{len(runs)} runs are in {out}")


def synth(out: Path, clips: int, languages: list[str], **options: Any) -> None:
    from .synth import synthesise

    codes = dict.fromkeys(language_of("--languages", text) for text in languages)
    synthesise(out, clips, languages=tuple(codes), **options)
    print(f"{clips} clips with captions are in {out}")


def reproduce(**options: Any) -> None:
    from .reproduction.run import reproduce

    print(f"report: {reproduce(**options)}")


def demo(**options: Any) -> None:
    from .reproduction.report import demo

    demo(**options)


# Each imports what it needs when it is called, so that --help is quick.
COMMANDS: dict[str, Callable[..., int | None]] = {
    "train": train,
    "check": check,
    "eval": evaluate,
    "zeroshot": zeroshot,
    "embed": embed,
    "search": search,
    "export": export,
    "plot": plot,
    "synth": synth,
    "reproduce": reproduce,
    "demo": demo,
}


def as_text(value: Any) -> Any:
    """Reads an argument as UTF-8 that Python took for bytes of another encoding."""
    if isinstance(value, list):
        return list(map(as_text, value))
    return value and value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code. What a user can put right has no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show does not stop us
            stream.reconfigure(errors="backslashreplace")
    options = vars(build_parser().parse_args(arguments))
    for name in {"query", "lang", "template", "languages"} & options.keys():
        options[name] = as_text(options[name])  # whatever the terminal's encoding
    # Threads that wait must not spin: with other work on the cores a step takes several times
    # as long. OpenMP reads this once, so it is set before PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return COMMANDS[options.pop("command")](**options) or 0
    except UserError as error:
        if str(error):
            print(f"supclap: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("supclap: interrupted; files already written are complete", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __package__:
            raise
        extra = {"transformers": "hub", "huggingface_hub": "hub"}
        extra |= {name: name for name in ("tensorboard", "wandb", "peft")}
        extra |= {name: "onnx" for name in ("onnx", "onnxscript", "onnxruntime")}
        print(
            f"supclap: {error.name} is not installed; "
            f"pip install 'supclap-kernels[{extra.get(missing, 'train')}]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, RuntimeError, MemoryError) as error:
        known = explained(error) or (UserError(str(error)) if isinstance(error, OSError) else None)
        if known is None:
            raise
        print(f"supclap: {known}", file=sys.stderr)
        return known.exit_code
