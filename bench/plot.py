"""Figure and README table from committed results: `python -m bench.plot [NAME] [--write |
--check]`.

Reads results/NAME.csv and NAME.env.json, draws results/NAME.png and prints the Markdown table that
belongs between the README's markers. `--write` puts it there; `--check` fails if the README says
something else, and neither draws nor needs matplotlib.
"""

import argparse
import csv
import json
import re
import sys
from typing import Any

from .cases import Row
from .machine import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SECTION = re.compile(f"(?<={BEGIN}).*?(?={END})", re.DOTALL)
TITLES = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "ours": "ours, 256 MiB workspace",
    "ours-32MiB": "ours, 32 MiB workspace",
}
COLOURS = {"eager": "#7f7f7f", "compile": "#d9822b", "ours": "#1f6fb4", "ours-32MiB": "#7fb3dd"}
HEADS = {"mirror": "bilateral `mirror`", "shared": "bilateral `shared`", "siglip": "SigLIP"}
"""Of the groups' lines; the others are one-sided."""
READABLE = 1024
"""Batch from which the resident peak, good to a few MiB, says something."""


def load(name: str) -> tuple[list[Row], dict[str, Any]]:
    """The rows, numbers as floats (None where nothing was measured), and the environment."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for column, text in row.items():
            if column in ("N", "D", "rounds"):
                row[column] = int(text)
            if column.endswith(("_ms", "_mib")):
                row[column] = float(text) if text else None
    return rows, json.loads((RESULTS / f"{name}.env.json").read_text())


def newest() -> str:
    """The results of a CPU, if there is one set."""
    names = sorted(path.stem for path in RESULTS.glob("cpu-*.csv") if "." not in path.stem)
    if len(names) != 1:
        raise SystemExit(f"name the results to use; {RESULTS.name}/ has {names or 'none'}")
    return names[0]


def milliseconds(value: float) -> str:
    """Three significant digits."""
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def mebibytes(value: float) -> str:
    return f"{value:.0f} MiB"


def threads(env: dict[str, Any]) -> str:
    return f"{env['threads']} thread{'s' * (env['threads'] != 1)}"


def cell(row: Row | None, eager: Row) -> str:
    """Time against eager's (eager's own as it is) and the resident peak."""
    if row is None:
        return "-"
    time = milliseconds(row["median_ms"])
    if row is not eager:
        time = f"{row['median_ms'] / eager['median_ms']:.2f}x"
    if row["N"] < READABLE or row["peak_mib"] is None:
        return time
    return f"{time}, {mebibytes(row['peak_mib'])}"


def table(rows: list[Row], env: dict[str, Any], name: str) -> str:
    """The README's section: one table, what it was measured on, and the figure."""
    lines = [
        "| forward + backward | " + " | ".join(TITLES.values()) + " |",
        "| --- |" + " --- |" * len(TITLES),
    ]
    for eager in (row for row in rows if row["peer"] == "eager"):
        peers = {row["peer"]: row for row in rows if row["group"] == eager["group"]}
        head = f"{HEADS.get(eager['group'], 'one-sided')}, N = {eager['N']:,}"
        cells = [cell(peers.get(peer), eager) for peer in TITLES]
        lines.append("| " + " | ".join([head, *cells]) + " |")
    rounds = min(row["rounds"] for row in rows)
    commit = env["commit"][:12] + ("-dirty" if env["commit"].endswith("-dirty") else "")
    return "\n".join(
        [
            *lines,
            "",
            f"Float32, D = {rows[0]['D']}, StaticSVR; time as a multiple of eager PyTorch's "
            "(medians of interleaved rounds), peak memory beyond the inputs and the returned "
            "gradients.",
            *further(rows),
            f"Measured on {env['cpu']}, {threads(env)} ({env['isa']}), torch {env['torch']}, at "
            f"least {rounds} rounds, {env['date'][:10]}, commit {commit}.",
            "",
            f"![Time and memory against the batch size](bench/results/{name}.png)",
        ]
    )


def further(rows: list[Row]) -> list[str]:
    """One sentence each on bfloat16 and on the largest batch."""
    lines = []
    narrow = [row for row in rows if row["peer"] == "ours-bfloat16"]
    for row in narrow:
        (wide,) = (r for r in rows if r["group"] == row["group"] and r["peer"] == "ours")
        ratio = row["median_ms"] / wide["median_ms"]
        lines.append(f"bfloat16 at N = {row['N']:,}: {ratio:.2f}x the time of our float32.")
    large = [row for row in rows if row["group"] == "large"]
    for row in sorted(large, key=lambda row: row["N"])[-1:]:
        memory = "" if row["peak_mib"] is None else f", {mebibytes(row['peak_mib'])}"
        time = milliseconds(row["median_ms"])
        lines.append(f"N = {row['N']:,} with a 32 MiB workspace: {time}{memory}.")
    return lines


def draw(rows: list[Row], env: dict[str, Any], name: str) -> None:
    """Time and memory against N, one-sided StaticSVR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), constrained_layout=True)
    main = [row for row in rows if row["group"].startswith("one-sided")]
    sizes = sorted({row["N"] for row in main})
    for peer, title in TITLES.items():
        points = [row for row in main if row["peer"] == peer]
        style = {"color": COLOURS[peer], "label": title}
        N, median = ([row[column] for row in points] for column in ("N", "median_ms"))
        spread = [
            [row["median_ms"] - row["q1_ms"] for row in points],
            [row["q3_ms"] - row["median_ms"] for row in points],
        ]
        left.errorbar(N, median, yerr=spread, marker="o", markersize=4, capsize=2, **style)
        right.plot(N, [row["allocated_mib"] for row in points], **style)
        seen = {row["N"]: row["peak_mib"] for row in points if row["N"] >= READABLE}
        right.plot(seen.keys(), seen.values(), "o", color=COLOURS[peer], fillstyle="none")
    left.set_ylabel("forward + backward, ms")
    right.set_ylabel("extra memory, MiB")
    right.plot([], [], color="black", label="PyTorch's allocator")
    right.plot([], [], "o", color="black", fillstyle="none", label="resident")
    handles, names = right.get_legend_handles_labels()
    right.legend(handles[-2:], names[-2:], frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(N) for N in sizes])
        axes.minorticks_off()
        axes.set_xlabel("batch size N")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"One-sided StaticSVR, float32, D = {main[0]['D']}, {env['cpu']}, "
        f"{threads(env)}, torch {env['torch']}",
        fontsize=9,
    )
    figure.savefig(RESULTS / f"{name}.png", dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("name", nargs="?", help="results to use (default: the CPU's, if only one)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="put the table into README.md")
    action.add_argument("--check", action="store_true", help="compare README.md with the results")
    arguments = parser.parse_args()
    name = arguments.name or newest()
    rows, env = load(name)
    if not any(row["group"].startswith("one-sided") for row in rows):
        raise SystemExit(f"{name} has no one-sided group: nothing to tabulate or draw")
    readme, section = README.read_text(), f"\n{table(rows, env, name)}\n"
    if len(SECTION.findall(readme)) != 1:
        sys.exit(f"README.md must hold {BEGIN} and {END} once each")
    if arguments.check:
        if SECTION.findall(readme) != [section]:
            sys.exit("README.md differs from the results; run `python -m bench.plot --write`")
        print("README.md agrees with the results")
        return
    draw(rows, env, name)
    if arguments.write:
        README.write_text(SECTION.sub(lambda _: section, readme))
    print(section.strip())


if __name__ == "__main__":
    main()
