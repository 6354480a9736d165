"""The claims of the paper, and of its critics, each as differences of paired seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .controls import CONTROLS
from .experiments import DYNAMIC, INFONCE, STATIC, SVR
from .findings import Findings, Result, pairs_of, recall, zero_shot
from .verdicts import Verdict

POINTS = "points of R@1"
HARDER = "more hard negatives"
ABLATION = (  # what is claimed, of which loss, over which
    ("SigLIP: bi-DynamicSVR retrieves better", "SigLIP bi-DynamicSVR", "SigLIP"),
    ("SigLIP: bi-StaticSVR retrieves better", "SigLIP bi-StaticSVR", "SigLIP"),
    ("bilateral is better than one-sided (static)", STATIC, "uni-StaticSVR"),
    ("bilateral is better than one-sided (dynamic)", DYNAMIC, "uni-DynamicSVR"),
    ("a dynamic radius is better than a static one", DYNAMIC, STATIC),
    ("a radius within the gap is better than any radius", DYNAMIC, f"{DYNAMIC}, no constraint"),
)


class Claims:
    """Verdicts over the findings, by chapter of the report."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.rate = findings.best_rate()
        self.baseline = findings.baseline()

    def chapters(self) -> dict[str, list[Verdict]]:
        """Those claims of which there are runs."""
        chapters = {
            "Better": self.better(),
            "Faster": self.faster(),
            "What it comes from": self.controls(),
            "The radius": self.radius(),
            "The trajectory": self.trajectory(),
            "Everything else the paper compares": self.others(),
        }
        measured = {
            title: [verdict for verdict in verdicts if verdict.differences]
            for title, verdicts in chapters.items()
        }
        return {title: verdicts for title, verdicts in measured.items() if verdicts}

    def compare(
        self,
        claim: str,
        more: list[Result],
        less: list[Result],
        value: Callable[[Result], float] = recall,
        unit: str = POINTS,
    ) -> Verdict:
        """Above zero where `more` has more of it."""
        return Verdict(claim, unit, [value(a) - value(b) for a, b in pairs_of(more, less)])

    def better(self) -> list[Verdict]:
        """At equal steps, and where training comes to rest, against the best InfoNCE."""
        found, long, verdicts = self.findings, self.findings.preset.long, []
        twice = found.runs(INFONCE, epochs=2 * found.preset.epochs)
        for name in SVR:
            runs = found.runs(name)
            claim = f"{name} retrieves better than the best InfoNCE at equal steps"
            verdicts.append(self.compare(claim, runs, self.baseline))
            claim = f"{name} retrieves better than InfoNCE, both with {long} times the steps"
            verdicts.append(self.compare(claim, found.long(name), found.long(INFONCE)))
            claim = f"{name} is better than InfoNCE with twice the steps"
            verdicts.append(self.compare(claim, runs, twice))
        return verdicts

    def faster(self) -> list[Verdict]:
        found, verdicts = self.findings, []
        for name in SVR:
            pairs = pairs_of(found.runs(name), self.baseline)
            claim = f"{name} converges faster than the best InfoNCE"
            unit = "steps sooner at the best R@1 that both reach"
            verdicts.append(Verdict(claim, unit, [found.steps_sooner(*pair) for pair in pairs]))
        return verdicts

    def controls(self) -> list[Verdict]:
        """What reviewers suspected; each control against the complete loss, and against nothing."""
        found = self.findings
        verdicts = []
        for name in CONTROLS:
            runs = found.runs(name)
            verdicts.append(
                self.compare(f"{STATIC} is better than {said(name)}", found.runs(STATIC), runs)
            )
            verdicts.append(
                self.compare(f"{said(name)} is better than InfoNCE", runs, found.runs(INFONCE))
            )
        return verdicts

    def radius(self) -> list[Verdict]:
        found, verdicts = self.findings, []
        for name in SVR:
            for reading, runs in (("", found.runs(name)), (" as printed", found.literal(name))):
                claim = f"the radius falls after the first tenth of training ({name}{reading})"
                verdicts.append(Verdict(claim, "fall of R", list(map(found.fall, runs))))
        runs = found.runs(DYNAMIC)
        for number in ("R", "R/r", "r"):
            for other, words in (("rank", "a worse rank"), ("hard negatives", HARDER)):
                claim = f"a larger {number} goes with {words}"
                key = f"{number} and {other}"
                values = found.difficulty(runs, key)
                verdicts.append(Verdict(claim, "Spearman's correlation", values))
        return verdicts

    def trajectory(self) -> list[Verdict]:
        found, verdicts = self.findings, []
        infonce = found.runs(INFONCE)
        for name in SVR:
            for words, key in (("steps of", "update_gap"), ("force on", "drift_gap")):
                claim = f"the trajectory drifts less ({words} the texts, {name})"
                value = partial(found.mean_diagnostic, key=key)
                verdicts.append(self.compare(claim, found.runs(name), infonce, value, "cosine"))
            claim = f"the gradient's norm varies less over steps ({name})"
            runs = found.runs(name)
            unit = "of the norm's deviation over its mean"
            verdicts.append(self.compare(claim, infonce, runs, found.norm_variation, unit))
        return verdicts

    def others(self) -> list[Verdict]:
        found, preset = self.findings, self.findings.preset
        verdicts = [
            self.compare(claim, found.runs(better), found.runs(worse))
            for claim, better, worse in ABLATION
        ]
        if preset.main_only:
            return verdicts
        for name in SVR:
            runs = found.runs(name)
            claim = f"zero-shot classification is better ({name})"
            verdicts.append(self.compare(claim, runs, self.baseline, zero_shot, "points"))
            claim = f"it carries over better to other acoustics ({name})"
            verdicts.append(self.compare(claim, runs, self.baseline, partial(recall, side="there")))
            for noise in preset.noises:
                claim = f"it is better with {noise} % of the captions wrong ({name})"
                data = f"here/noise{noise}"
                verdicts.append(
                    self.compare(claim, found.runs(name, data), found.runs(INFONCE, data))
                )
            for size in preset.batch_sizes:
                claim = f"it is better at batch size {size} ({name})"
                others = found.runs(INFONCE, batch_size=size)
                verdicts.append(self.compare(claim, found.runs(name, batch_size=size), others))
        for alpha in preset.alphas:
            other = found.runs(DYNAMIC, alpha=alpha)
            claim = f"alpha = 1 is better than {alpha:g}"
            verdicts.append(self.compare(claim, found.runs(DYNAMIC), other))
        return verdicts


def said(control: str) -> str:
    """A control in a sentence."""
    return control if control.startswith("R =") else f'"{control}"'
