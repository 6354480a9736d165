"""The options of the `supclap` command: every setting of a run is one."""

from __future__ import annotations

import argparse
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from .config import MODEL, MOVABLE, RECIPES, TRAIN, flag, holds_many, kind_of
from .formats import FORMATS

SHARED = ("device", "threads", "skip_bad_audio", "workers", "cache")


def add_options(parser: Any, settings: dict[str, Any]) -> None:
    """Adds an option for each setting; one that the user leaves out is not in the result."""
    for name, setting in settings.items():
        kind, text = kind_of(setting), setting.metadata["help"]
        choices = setting.metadata["choices"]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": name}
        if setting.default not in (None, MISSING, ()):
            text += f" (default: {setting.default})"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": choices}
            options |= {"nargs": "+", "action": "extend"} if holds_many(setting) else {}
            options["metavar"] = None if choices else kind.__name__.upper()
        parser.add_argument(flag(name), help=text, **options)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the commands and their options."""
    parser = argparse.ArgumentParser(prog="supclap", description="Train and use audio-text models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = {name: TRAIN[name] for name in SHARED}

    train = commands.add_parser("train", help="train on manifests")
    train.add_argument("--config", type=Path, metavar="FILE", help="TOML with any of these flags")
    train.add_argument("--recipe", choices=tuple(RECIPES), help="settings of a published run")
    train.add_argument(
        "--resume", type=Path, metavar="RUN",
        help="go on with a run; with it go only " + ", ".join(flag(name) for name in MOVABLE),
    )  # fmt: skip
    add_options(train, TRAIN)
    add_options(train.add_argument_group("model"), MODEL)

    check = commands.add_parser(
        "check", help="describe manifests and list their problems",
        epilog=f"Manifests are\n\n{FORMATS}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    check.add_argument(
        "manifests", type=Path, nargs="+", metavar="MANIFEST",
        help="or labelled clips; of several: what the first one and a later one share",
    )  # fmt: skip
    check.add_argument("--workers", type=int, help="that decode (default: one for each core)")

    def on_a_run(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.add_argument("run", type=Path, metavar="RUN", help="folder that `train` wrote")
        command.add_argument("--batch-size", type=int, default=64, help="encoded at once")
        add_options(command, shared)
        return command

    evaluation = on_a_run("eval", "retrieval metrics of a run on manifests")
    evaluation.add_argument("--data", type=Path, required=True, nargs="+", help="manifests")
    evaluation.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics here")

    zeroshot = on_a_run("zeroshot", "classify labelled clips by sentences")
    zeroshot.add_argument(
        "--data", type=Path, required=True, help="ESC-50, UrbanSound8K, or a CSV: audio, label"
    )
    zeroshot.add_argument(
        "--template", action="append", help="such as 'This is a sound of {label}'; may be repeated"
    )
    zeroshot.add_argument("--lang", default="eng", help="language of the templates")
    zeroshot.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")

    embed = on_a_run("embed", "write the embeddings of sounds and sentences")
    embed.add_argument(
        "--data", type=Path, required=True,
        help="manifest, folder of sounds, or .txt with a sentence a line",
    )  # fmt: skip
    embed.add_argument(
        "--out", type=Path, required=True, help="FILE.safetensors, .npy or .faiss (an index)"
    )
    embed.add_argument("--only", choices=("audio", "text"), help="of a manifest")
    embed.add_argument("--lang", default="eng", help="language of the lines of a .txt")

    search = on_a_run("search", "find sounds by a sentence or by a sound")
    search.add_argument("query", nargs="?", help='such as "a dog barks"')
    search.add_argument("--like", type=Path, metavar="FILE", help="a sound, instead of a query")
    among = search.add_mutually_exclusive_group(required=True)
    among.add_argument("--audio", type=Path, metavar="FOLDER", help="searched in depth")
    among.add_argument("--index", type=Path, metavar="FILE", help="what `embed` wrote")
    search.add_argument("--top", type=int, default=10)
    search.add_argument("--lang", default="eng", help="language of the query")
    search.add_argument("--json", type=Path, metavar="FILE", help="also write the hits here")

    export = commands.add_parser("export", help="write a run for other libraries")
    export.add_argument("run", type=Path, metavar="RUN", help="folder that `train` wrote")
    export.add_argument(
        "--to", choices=("hub", "onnx"), required=True,
        help="hub: transformers and sentence-transformers load it; onnx: a graph of each tower",
    )  # fmt: skip
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER")

    plot = commands.add_parser("plot", help="draw how runs went, in one picture")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    plot.add_argument("--out", type=Path, required=True, help="FILE.png, .svg, .pdf or .html")

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
    of = reproduce.add_mutually_exclusive_group(required=True)
    of.add_argument("--preset", choices=("smoke", "cpu", "gpu"), help="on a synthetic corpus")
    of.add_argument(
        "--real", type=Path, metavar="FOLDER", help="on recordings: manifests train, val and test"
    )
    reproduce.add_argument("--out", type=Path, required=True, help="folder; an earlier one goes on")
    reproduce.add_argument("--jobs", type=int, help="runs at a time (default: one for each core)")

    demo = commands.add_parser("demo", help="synth, train InfoNCE and bi-StaticSVR, eval, plot")
    demo.add_argument("--out", type=Path, default=Path("supclap-demo"))
    demo.add_argument("--clips", type=int, default=1000)
    demo.add_argument("--epochs", type=int, default=4)
    demo.add_argument("--seed", type=int, default=0)
    add_options(demo, {name: TRAIN[name] for name in ("device", "threads")})
    return parser
