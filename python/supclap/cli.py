"""The `supclap` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

from .config import (
    MODEL,
    MOVABLE,
    RECIPES,
    TRAIN,
    UserError,
    build_config,
    explained,
    flag,
    kind_of,
    read_config,
)

ON_TEST = "NOTE: this checkpoint was selected on a test set"
SHARED = ("device", "threads", "skip_bad_audio", "workers", "cache")


def add_options(parser: Any, settings: dict[str, Any], required: tuple[str, ...] = ()) -> None:
    """One option for each setting; one that is not given is not in the result."""
    for name, one in settings.items():
        text, choices = one.metadata["help"], one.metadata["choices"]
        given: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name}
        if one.default not in (None, MISSING):
            text += f" (default: {one.default})"
        if kind_of(one) is bool:
            given["action"] = argparse.BooleanOptionalAction
        else:
            given |= {"type": kind_of(one), "choices": choices}
            given["metavar"] = None if choices else kind_of(one).__name__.upper()
        parser.add_argument(flag(name), help=text, required=name in required, **given)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="supclap", description="Train and use audio-text models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = {name: TRAIN[name] for name in SHARED}

    train = commands.add_parser("train", help="train on a manifest")
    train.add_argument("--config", type=Path, metavar="FILE", help="TOML with any of these flags")
    train.add_argument("--recipe", choices=tuple(RECIPES), help="settings of a published run")
    train.add_argument(
        "--resume", type=Path, metavar="RUN",
        help="go on with a run; with it go only " + ", ".join(flag(name) for name in MOVABLE),
    )  # fmt: skip
    add_options(train, TRAIN)
    add_options(train.add_argument_group("model"), MODEL)

    check = commands.add_parser("check", help="describe a manifest and list its problems")
    check.add_argument("manifest", type=Path, metavar="MANIFEST")

    def on_a_run(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.add_argument("run", type=Path, metavar="RUN", help="folder that `train` wrote")
        command.add_argument("--batch-size", type=int, default=64, help="encoded at once")
        add_options(command, shared)
        return command

    evaluate = on_a_run("eval", "retrieval metrics of a run on manifests")
    evaluate.add_argument("--data", type=Path, required=True, nargs="+", help="manifests")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics here")

    zeroshot = on_a_run("zeroshot", "classify labelled clips by sentences")
    zeroshot.add_argument(
        "--data", type=Path, required=True, help="ESC-50, UrbanSound8K, or a CSV: file_name, label"
    )
    zeroshot.add_argument(
        "--template", action="append", help="such as 'This is a sound of {label}'; may be repeated"
    )
    zeroshot.add_argument("--lang", default="eng", help="language of the templates")
    zeroshot.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")

    embed = on_a_run("embed", "write the embeddings of a manifest")
    embed.add_argument("--data", type=Path, required=True, help="manifest")
    embed.add_argument("--out", type=Path, required=True, help="safetensors file")

    search = on_a_run("search", "find clips of a folder by a sentence")
    search.add_argument("query", help='such as "a dog barks"')
    search.add_argument("--audio", type=Path, required=True, help="folder, searched in depth")
    search.add_argument("--top", type=int, default=10)
    search.add_argument("--lang", default="eng", help="language of the query")

    synth = commands.add_parser("synth", help="write a corpus of synthetic scenes with captions")
    synth.add_argument("out", type=Path, metavar="OUT", help="gets {train,val,test}.csv and audio/")
    synth.add_argument("--clips", type=int, default=1000, help="in all (default: 1000)")
    synth.add_argument(
        "--languages", nargs="+", default=["eng"], help="of the captions: eng fra ..."
    )
    synth.add_argument("--captions", type=int, default=5, help="of a clip in each (default: 5)")
    synth.add_argument(
        "--shifted", action="store_true", help="slower and lower, in a room, over noise"
    )
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--overwrite", action="store_true", help="write over an earlier corpus")

    reproduce = commands.add_parser("reproduce", help="the paper's tables, figures and claims")
    reproduce.add_argument("--preset", choices=("smoke", "cpu", "gpu"), required=True)
    reproduce.add_argument("--out", type=Path, required=True, help="folder; an earlier one goes on")
    reproduce.add_argument("--jobs", type=int, help="runs at a time (default: one for each core)")

    demo = commands.add_parser("demo", help="synth, train InfoNCE and bi-StaticSVR, eval, plot")
    demo.add_argument("--out", type=Path, default=Path("supclap-demo"))
    demo.add_argument("--clips", type=int, default=1000)
    demo.add_argument("--epochs", type=int, default=4)
    demo.add_argument("--seed", type=int, default=0)
    add_options(demo, {name: TRAIN[name] for name in ("device", "threads")})
    return parser


def run_train(config: Path | None, recipe: str | None, resume: Path | None, **given: Any) -> None:
    from .train import train

    if resume is None:
        train(build_config(given, config, recipe))
        return
    names = [flag(name) for name in given if name not in MOVABLE] + ["--config"] * bool(config)
    names += ["--recipe"] * bool(recipe)
    if names:
        raise UserError(
            f"--resume goes on with the settings of {resume}/config.json; drop {', '.join(names)}"
        )
    train(replace(read_config(resume), **given), resume=True)


def language(option: str, given: str) -> str:
    """The code of a language given on the command line."""
    from .languages import language_code

    try:
        return language_code(given)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def use_of(args: dict[str, Any]) -> Any:
    """What every command on a run shares, taken out of its arguments."""
    from .evaluate import Use
    from .ranks import choose_device, set_threads

    if args["batch_size"] < 1:
        raise UserError(f"--batch-size must be at least 1, got {args['batch_size']}")
    if args.get("workers", 0) < 0:
        raise UserError(f"--workers must not be negative, got {args['workers']}")
    set_threads(args.pop("threads", None))
    found = {name: args.pop(name) for name in SHARED if name in args}
    device = choose_device(found.pop("device", "auto"))
    return Use(device=device, rows=args.pop("batch_size"), **found)


def tell_skipped(skipped: list[str]) -> None:
    if skipped:
        print(f"skipped {len(skipped)} bad audio files:")
        print("\n".join(f"  {reason}" for reason in skipped))


def run_eval(run: Path, data: list[Path], json: Path | None, **args: Any) -> None:
    from .evaluate import RULE, evaluate_run
    from .files import check_folder_of, write_json
    from .report import COLUMNS, table

    if json is not None:
        check_folder_of(json, "--json")
    use, found = use_of(args), {}
    for manifest in data:
        metrics, corpus = evaluate_run(run, manifest, use)
        found[str(manifest)] = metrics
        tell_skipped(corpus.skipped)
        print(f"{manifest}: {len(corpus.clips)} clips, {len(corpus.captions)} captions, in %")
        rows = {f"{run} {name}": one for name, one in metrics.get("languages", {}).items()}
        mean = f"{run} mean of {len(rows)} languages" if rows else str(run)
        print(table({**rows, mean: metrics}, COLUMNS))
        for way, name in (("t2a", "text to audio"), ("a2t", "audio to text")):
            print(f"median rank, {name}: {metrics[way]['median_rank']:g}")
        if "selected_on" in metrics:
            print(ON_TEST)
    print(f"rule: {RULE}")
    if json is not None:
        write_json(json, {"rule": RULE} | (metrics if len(data) == 1 else found))


def run_zeroshot(run: Path, data: Path, json: Path | None, **args: Any) -> None:
    from .files import check_folder_of, write_json
    from .zeroshot import classify_run

    if json is not None:
        check_folder_of(json, "--json")
    template, lang = args.pop("template"), language("--lang", args.pop("lang"))
    found = classify_run(run, data, template, lang, use_of(args))
    tell_skipped(found["skipped"])
    print(f"{data}: {found['clips']} clips, {found['classes']} classes, in %")
    for name in ("accuracy", "top5", "mean_class_accuracy", "mean_fold_accuracy"):
        if name in found:
            print(f"{name:<20}{100 * found[name]:8.2f}")
    print(f"templates: {', '.join(found['templates'])}")
    if "selected_on" in found:
        print(ON_TEST)
    print(f"rule: {found['rule']}")
    if json is not None:
        write_json(json, found)


def run_search(run: Path, query: str, audio: Path, top: int, lang: str, **args: Any) -> None:
    from .model import chosen_on_test
    from .search import search

    found, skipped = search(run, query, audio, top, language("--lang", lang), use_of(args))
    tell_skipped(skipped)
    print("rank  cosine  file")
    for rank, (score, name) in enumerate(found, 1):
        print(f"{rank:4d}  {score:6.3f}  {name}")
    if chosen_on_test(run):
        print(ON_TEST)


def run_command(args: argparse.Namespace) -> int:
    """Carry out one parsed command; heavy imports happen here, so that --help is quick."""
    options = vars(args).copy()
    command = options.pop("command")
    if command == "train":
        run_train(**options)
    elif command == "check":
        from .check import check

        said, problems = check(args.manifest)
        print("\n".join(said))
        print("\n".join([*problems, f"{len(problems)} problems"]) if problems else "no problems")
        return 1 if problems else 0
    elif command == "eval":
        run_eval(**options)
    elif command == "zeroshot":
        run_zeroshot(**options)
    elif command == "embed":
        from .search import embed

        run, data, out = (options.pop(name) for name in ("run", "data", "out"))
        clips, captions = embed(run, data, out, use_of(options))
        print(f"{clips} clips and {captions} captions are in {out}")
    elif command == "search":
        run_search(**options)
    elif command == "synth":
        from .synth import synthesise

        codes = [language("--languages", given) for given in args.languages]
        synthesise(**options | {"languages": tuple(dict.fromkeys(codes))})
        print(f"{args.clips} clips with captions are in {args.out}")
    elif command == "reproduce":
        from .reproduce import reproduce

        print(f"report: {reproduce(**options)}")
    else:
        from .report import demo

        demo(**options)
    return 0


def as_text(given: Any) -> Any:
    """An argument in UTF-8 that Python took for bytes of another encoding."""
    if isinstance(given, list):
        return [as_text(one) for one in given]
    return given and given.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can put right ends without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show does not stop us
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    args = build_parser().parse_args(given)
    for name in (
        "query",
        "lang",
        "template",
        "languages",
    ):  # text, whatever the terminal's encoding
        if hasattr(args, name):
            setattr(args, name, as_text(getattr(args, name)))
    # Threads that wait must not spin: with other work on the cores a step takes several times
    # as long. OpenMP reads this once, so it is set before PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return run_command(args)
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
        extra = {"transformers": "hub", "huggingface_hub": "hub", "tensorboard": "tensorboard"}
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
