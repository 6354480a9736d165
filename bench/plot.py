"""Figure and README table from committed results: `python -m bench.plot [NAME] [--write |
--check]`.

Reads results/NAME.csv and NAME.env.json, draws results/NAME.png and prints the Markdown table that
belongs between the README's markers. `--write` puts it there; `--check` fails if the README says
something else, and neither draws nor needs matplotlib.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TITLES = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "ours": "ours, 256 MiB workspace",
    "ours-32MiB": "ours, 32 MiB workspace",
}
COLOURS = {"eager": "#7f7f7f", "compile": "#d9822b", "ours": "#1f6fb4", "ours-32MiB": "#7fb3dd"}
READABLE = 1024
"""Batch from which the resident peak, good to a few MiB, says something."""

Row = dict[str, Any]


def load(name: str) -> tuple[list[Row], dict[str, Any]]:
    """The rows, numbers as floats (None where nothing was measured), and the environment."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for key, value in row.items():
            if key in ("N", "D", "rounds"):
                row[key] = int(value)
            if key.endswith(("_ms", "_mib")):
                row[key] = float(value) if value else None
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


def cell(row: Row | None, eager: Row | None) -> str:
    """Time against eager's (or the time itself) and the resident peak."""
    if row is None:
        return "-"
    if eager is None or row is eager:
        parts = [milliseconds(row["median_ms"])]
    else:
        parts = [f"{row['median_ms'] / eager['median_ms']:.2f}x"]
    if row["N"] >= READABLE and row["peak_mib"] is not None:
        parts.append(mebibytes(row["peak_mib"]))
    return ", ".join(parts)


def table(rows: list[Row], env: dict[str, Any], name: str) -> str:
    """The README's section: one table, what it was measured on, and the figure."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["peer"]] = row
    lines = [
        "| forward + backward | " + " | ".join(TITLES.values()) + " |",
        "| --- |" + " --- |" * len(TITLES),
    ]
    named = {"mirror": "bilateral `mirror`", "shared": "bilateral `shared`", "siglip": "SigLIP"}
    for group, peers in groups.items():
        if "eager" not in peers:
            continue
        N = peers["eager"]["N"]
        head = f"{named.get(group, 'one-sided')}, N = {N:,}"
        cells = [cell(peers.get(peer), peers["eager"]) for peer in TITLES]
        lines.append("| " + " | ".join([head, *cells]) + " |")
    D = rows[0]["D"]
    lines += [
        "",
        f"Float32, D = {D}, StaticSVR; time as a multiple of eager PyTorch's (medians of "
        "interleaved rounds), peak memory beyond the inputs and the returned gradients.",
    ]
    lines += further(rows)
    rounds = min(row["rounds"] for row in rows)
    commit = env["commit"][:12] + ("-dirty" if env["commit"].endswith("-dirty") else "")
    lines += [
        f"Measured on {env['cpu']}, {threads(env)} ({env['isa']}), "
        f"torch {env['torch']}, at least {rounds} rounds, {env['date'][:10]}, commit {commit}.",
        "",
        f"![Time and memory against the batch size](bench/results/{name}.png)",
    ]
    return "\n".join(lines)


def further(rows: list[Row]) -> list[str]:
    """One sentence each on bfloat16 and on the largest batch."""
    found = {(row["group"], row["peer"], row["N"]): row for row in rows}
    lines = []
    low = [row for key, row in found.items() if key[:2] == ("bfloat16", "ours-bfloat16")]
    for row in low:
        wide = found[("bfloat16", "ours", row["N"])]
        ratio = row["median_ms"] / wide["median_ms"]
        lines.append(f"bfloat16 at N = {row['N']:,}: {ratio:.2f}x the time of our float32.")
    large = [row for key, row in found.items() if key[0] == "large"]
    if large:
        row = max(large, key=lambda row: row["N"])
        text = f"N = {row['N']:,} with a 32 MiB workspace: {milliseconds(row['median_ms'])}"
        memory = "" if row["peak_mib"] is None else f", {mebibytes(row['peak_mib'])}"
        lines.append(f"{text}{memory}.")
    return lines


def draw(rows: list[Row], env: dict[str, Any], path: Path) -> None:
    """Time and memory against N, one-sided StaticSVR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), constrained_layout=True)
    main = [row for row in rows if row["group"].startswith("one-sided")]
    sizes = sorted({row["N"] for row in main})
    for peer, title in TITLES.items():
        own = sorted((row for row in main if row["peer"] == peer), key=lambda row: row["N"])
        if not own:
            continue
        N = [row["N"] for row in own]
        median = [row["median_ms"] for row in own]
        spread = [
            [row["median_ms"] - row["q1_ms"] for row in own],
            [row["q3_ms"] - row["median_ms"] for row in own],
        ]
        style = {"color": COLOURS[peer], "label": title}
        left.errorbar(N, median, yerr=spread, marker="o", markersize=4, capsize=2, **style)
        known = [row for row in own if row["allocated_mib"] is not None]
        right.plot([row["N"] for row in known], [row["allocated_mib"] for row in known], **style)
        seen = [row for row in known if row["N"] >= READABLE]
        right.plot(
            [row["N"] for row in seen],
            [row["peak_mib"] for row in seen],
            "o",
            color=COLOURS[peer],
            fillstyle="none",
        )
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
    figure.savefig(path, dpi=150, metadata={"Software": None})


def split_readme() -> tuple[str, str, str]:
    """Before, between and after the markers."""
    text = README.read_text() if README.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md must hold {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before + BEGIN, inside, END + after


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
    section = f"\n{table(rows, env, name)}\n"
    if arguments.check:
        if split_readme()[1] != section:
            sys.exit("README.md differs from the results; run `python -m bench.plot --write`")
        print("README.md agrees with the results")
        return
    draw(rows, env, RESULTS / f"{name}.png")
    if arguments.write:
        before, _, after = split_readme()
        README.write_text(before + section + after)
    print(section.strip())


if __name__ == "__main__":
    main()
