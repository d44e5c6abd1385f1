"""Writes measurements and findings as one HTML page of tables and inline SVG, without scripts or network access."""

from __future__ import annotations

import io
import math
import os
import re
import traceback
from collections.abc import Iterable
from html import escape
from typing import Any

from torch import Tensor, nn

from . import findings as rules
from .conditioning import LayerConditioning
from .findings import Finding, Measurements
from .recorder import first_line
from .weight_domination import DOMINATED

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2330; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.2rem;
  border-bottom: 1px solid #d8dde6; padding-bottom: .2rem; }
.about { color: #5a6475; margin: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e8ebf0; white-space: nowrap; }
th { background: #f5f7fa; font-weight: 600; } td:first-child, th:first-child { text-align: left; }
td.bad { background: #fbe3dc; } td.text, th.text { text-align: left; }
.finding { border-left: 5px solid #56B4E9; background: #f5f9fc; padding: .6rem 1rem; margin: .8rem 0; }
.s2 { border-color: #E69F00; background: #fdf8ee; } .s3 { border-color: #D55E00; background: #fdf1ec; }
.finding h3 { margin: 0 0 .2rem; font-size: 1rem; } .finding p { margin: .2rem 0; }
.rule { color: #5a6475; font-size: 13px; } .good { border-color: #009E73; background: #eff8f4; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } figcaption { color: #5a6475; font-size: 13px; }
"""
_CAPTIONS = {
    "energy": "Squared gradient of every weight layer's output. Flat is good; a slope down to the left is information "
    "that is lost on the way back, a slope up to the left an explosion.",
    "statistics": "Standard deviations of all signals and their gradients, and the share of each activation's values "
    "at which it is flat.",
    "conditioning": "Left and middle: against the layers. Right: the whole spectrum of the worst layer, before and "
    "after each remedy: the flatter, the faster.",
    "domination": "Largest singular values of every weight and of its gradient. Where they are very far apart, a step "
    "at an ordinary rate does not change the layer.",
    "propagation": "For the block from each layer to the next one that depends on it.",
}
_SEVERITY = {3: "prevents training", 2: "slows training", 1: "worth knowing"}


_NO_ROWS = "few rows"


def page(result: Measurements, findings: list[Finding], title: str, about: dict[str, str]) -> str:
    facts = {
        "network": f"{result.model}, {result.parameters:,} parameters, {result.mode} mode",
        "batch": f"{result.samples} samples, loss {number(result.loss)}",
        **about,
    }
    if result.synthetic:
        facts["note"] = (
            "the inputs are random numbers: what is said of weights and gradients holds at this point of the training, "
            "what is said of the inputs of layers may differ for real ones"
        )
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="about">{escape(k)}: {escape(v)}</p>' for k, v in facts.items()),
        "<h2>What is wrong, and what would help</h2>",
        *_verdict(result, findings),
        *_findings(findings),
        *_not_measured(result.failed),
        "<h2>Layer by layer</h2>",
        _layers(result),
        "<p class='rule'>rms: root mean square of the output. gradient: of the loss by that output. "
        "κ80 %: largest input "
        "eigenvalue over the one at 80 % of the spectrum, as it is, behind a BatchRMSNorm, with the preconditioner "
        f"(damping {result.conditioning.damping:g}, chunks of {result.conditioning.chunk}), and with "
        f"both; “{_NO_ROWS}”: fewer than two rows a unit, so that it says little. λmax: of the "
        "inputs and of the output gradients; 2 / (their product) estimates the largest stable "
        "learning rate. ∂W / W: largest singular value of the weight's gradient over that of the weight. Marked cells "
        f"crossed a threshold.{_part_note(result)}</p>",
        _activations(result),
        *_section("Gradient energy", result, "gradient_energy", result.energy, bool(result.energy.layers), "energy"),
        *_section(
            "Activations and gradients", result, "activation_statistics", result.statistics,
            bool(result.statistics.layers), "statistics",
        ),
        *_section(
            "Conditioning", result, "conditioning", result.conditioning,
            any(x.input[-1] for x in result.conditioning.layers), "conditioning",
        ),
        *_section(
            "Weight domination", result, "weight_domination", result.domination,
            bool(result.domination.layers), "domination",
        ),
        *_section(
            "Propagation of the residual", result, "propagation", result.propagation,
            bool(result.propagation.blocks), "propagation",
        ),
        _blocks(result) if result.propagation.blocks else "",
        "<h2>Lipschitz bound</h2>",
        _lipschitz(result),
        "<h2>Thresholds</h2>",
        _thresholds(),
    ]  # fmt: skip
    return _document(title, parts)


def _part_note(result: Measurements) -> str:
    some = any(map(_is_part, result.conditioning.layers))
    return " Where the units have a *, a part of them was drawn to stand for all." if some else ""


def _document(title: str, parts: list[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _section(heading: str, result: Measurements, part: str, measured: Any, is_there: bool, caption: str) -> list[str]:
    """A figure under its heading, or why there is none. A figure that cannot be drawn does not cost the page."""
    shown = [f"<h2>{heading}</h2>"]
    if part in result.failed:
        shown.append(f"<p class='rule'>Not measured, or not everywhere: {escape(result.failed[part])}.</p>")
    if is_there:
        try:
            shown.append(figure(measured, _CAPTIONS[caption]))
        except Exception as error:
            shown.append(f"<p class='rule'>The figure cannot be drawn ({escape(first_line(error))}).</p>")
    elif part not in result.failed:
        shown.append("<p>There is nothing to measure.</p>")
    return shown


_PARTS = {
    "activation_statistics": "activations",
    "gradient_energy": "gradient energy",
    "weight_domination": "weight domination",
    "lipschitz": "the Lipschitz bound",
}


def _not_measured(failed: dict[str, str]) -> list[str]:
    return [
        f"<p class='rule'>Not measured, or not everywhere: {escape(_PARTS.get(part, part))} ({escape(reason)}).</p>"
        for part, reason in failed.items()
    ]


def page_of_failure(model: nn.Module, title: str, about: dict[str, str], error: BaseException) -> str:
    """The page of a network that does not run: where it stopped, and what can be said without running it."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [
        f
        for f in frames
        if f"{os.sep}torch{os.sep}" not in f.filename and __package__.partition(".")[0] not in f.filename
    ]
    where = (outside or list(frames))[-1:]
    rows = [
        [name, type(module).__name__, str(tuple(weight.shape)), float(weight.detach().float().square().mean().sqrt())]
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.numel()
    ]
    places = "".join(
        f"<p>{escape(f.filename)}, line {f.lineno}, in {escape(f.name)}: {escape(f.line or '')}</p>" for f in where
    )
    return _document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            *(f'<p class="about">{escape(k)}: {escape(v)}</p>' for k, v in about.items()),
            "<h2>What is wrong, and what would help</h2>",
            "<div class='finding s3'><h3>The network does not run on these inputs <small>(prevents training)</small>"
            "</h3>"
            f"<p>{escape(first_line(error))}</p>{places}"
            "<p><b>What helps.</b> A dictionary is passed by its names if forward takes them all, and as one argument "
            "if not; a tuple is a list of arguments.</p></div>",
            "<h2>Weights</h2>",
            table(["layer", "kind", "weight", "rms"], rows, 3),
        ],
    )


def number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


def table(head: list[str], rows: Iterable[list[Any]], text: int = 2) -> str:
    """Return an HTML table. The first ``text`` columns are text; a cell ``(value, True)`` is marked."""

    def cell(tag: str, column: int, value: Any) -> str:
        bad = isinstance(value, tuple)
        value = value[0] if bad else value
        kind = "bad" if bad else "text" if column < text else ""
        content = escape(value if isinstance(value, str) else number(float(value)))
        return f"<{tag}{f' class={kind!r}' if kind else ''}>{content}</{tag}>"

    lines = ["".join(cell("td", i, value) for i, value in enumerate(row)) for row in rows]
    top = "".join(cell("th", i, value) for i, value in enumerate(head))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def figure(result: Any, caption: str) -> str:
    """Return the plot as inline SVG; text stays text, and identifiers differ from figure to figure."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": type(result).__name__}):
        result.plot().savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # matplotlib names groups alike in every figure; identifiers must be unique in the page.
    name = type(result).__name__.lower()
    svg = re.sub(r'id="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", svg)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _findings(findings: list[Finding]) -> list[str]:
    if not findings:
        return []
    return [
        f'<div class="finding s{f.severity}"><h3>{escape(f.title)} <small>({_SEVERITY[f.severity]})</small></h3>'
        f"<p>{escape(f.measured)}</p><p><b>What helps.</b> {escape(f.advice)}</p>"
        f'<p class="rule">Rule: {escape(f.rule)}.</p></div>'
        for f in findings
    ]


def _is_part(layer: LayerConditioning) -> bool:
    """Whether a part of the units stands for all."""
    return bool(layer.input[-1]) and (len(layer.spectrum("input")), len(layer.spectrum("gradient"))) != (
        layer.inputs,
        layer.outputs,
    )


def _verdict(result: Measurements, findings: list[Finding]) -> list[str]:
    """The page in three sentences."""
    worst = max((f.severity for f in findings), default=0)
    begin = {
        3: "Something here prevents training.",
        2: "Nothing here prevents training; something slows it down.",
        1: "Nothing here prevents or slows training.",
        0: "No threshold was crossed.",
    }
    said = [begin[worst]]
    step = rules.typical_step(result.energy)
    if step is not None:
        ratio, first, last = step
        way = f"{number(ratio)} times as long" if ratio >= 1 else f"{number(1 / ratio)} times as short"
        said.append(f"Back from {last} to {first}, layers of one role, the gradient of a sample becomes {way}.")
    judged = [x for x in result.conditioning.layers if x.input[-1] and rules.is_full(x)]
    if judged:
        before, after = (
            sorted(x.kappa(which, rules.P) for x in judged)[len(judged) // 2] for which in ("input", "preconditioned")
        )
        said.append(
            f"The inputs of {len(judged)} of {len(result.conditioning.layers)} layers could be judged: their middle "
            f"κ80 % is {number(before)} as they are and {number(after)} with the preconditioner (1 is best)."
        )
    return [f"<p>{escape(' '.join(said))}</p>"]


def _mark(value: Any, bad: bool) -> Any:
    return (value, True) if bad else value


def _layers(result: Measurements) -> str:
    statistics = {x.name: x for x in result.statistics.layers}
    energy = {x.name: x for x in result.energy.layers}
    ratios = {x.name: x.ratio() for x in result.domination.layers}
    rows = []
    for x in result.conditioning.layers:
        s, e = statistics.get(x.name), energy.get(x.name)
        full = rules.is_full(x)
        kappas: list[Any] = [x.kappa(which, rules.P) if x.input[-1] else math.nan for which in _REMEDIES]
        bad = full and kappas[0] > rules.KAPPA
        if not full:
            kappas = [_NO_ROWS] * len(kappas)
        rows.append(
            [
                x.name,
                x.kind,
                f"{x.inputs or '?'} → {x.outputs or '?'}" + ("*" if _is_part(x) else ""),
                str(x.rows[-1]),
                s.rms[-1] if s else math.nan,
                math.sqrt(e.energy[-1]) if e else math.nan,
                _mark(kappas[0], bad),
                *kappas[1:],
                x.lambda_max("input"),
                x.lambda_max("gradient"),
                _mark(ratio := ratios.get(x.name, math.nan), 0 < ratio < DOMINATED),
            ]
        )
    head = ["layer", "kind", "units", "rows", "rms", "gradient", "κ80 %", "normalised", "preconditioned", "both"]
    return table([*head, "λmax inputs", "λmax gradients", "∂W / W"], rows)


_REMEDIES = ("input", "normalised", "preconditioned", "both")


def _activations(result: Measurements) -> str:
    rows = [
        [
            x.name,
            x.kind,
            x.mean[-1],
            x.std[-1],
            x.percentile[-1],
            _mark(100 * x.saturation[-1], x.saturation[-1] > rules.SATURATED.get(x.kind, rules.SATURATED_BOUNDED)),
            _mark(100 * x.dead[-1], x.dead[-1] > rules.DEAD),
            x.gradient_std[-1],
        ]
        for x in result.statistics.layers
        if not math.isnan(x.saturation[-1])
    ]
    head = ["activation", "kind", "mean", "std", "98th percentile", "flat %", "dead units %", "gradient std"]
    return f"<h2>Activations</h2>{table(head, rows)}" if rows else ""


def _blocks(result: Measurements) -> str:
    rows = [
        [
            f"{b.start} → {b.end}",
            b.method,
            "yes" if b.bypassed else "no",
            f"{b.inputs} → {b.outputs}",
            b.sigma_max,
            b.mean_singular_value,
            b.rank,
            b.nullity,
            _mark(b.image_fraction, rules.loses_residual(b)),
            b.decay,
            b.gain,
        ]
        for b in result.propagation.blocks
    ]
    head = [
        "block",
        "method",
        "skip",
        "size",
        "sigma max",
        "sigma mean",
        "rank",
        "nullity of Jᵀ",
        "image fraction",
        "decay",
        "gain",
    ]
    there = [i for i in range(len(head)) if i < 4 or any(not _is_nan(row[i]) for row in rows)]
    head, rows = [head[i] for i in there], [[row[i] for i in there] for row in rows]
    note = (
        "skip: whether another way leads around the block. method: exact, from the whole Jacobian; lanczos, estimates, "
        "of which the largest singular value is good and the others are coarse; gradient, the gain alone, where an "
        "operation has no second derivative or the block is too large."
    )
    return f"{table(head, rows, 3)}<p class='rule'>{note}</p>"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _lipschitz(result: Measurements) -> str:
    bound = result.lipschitz
    if bound is None:
        return f"<p>There is no global bound for this network: {escape(result.no_lipschitz)}.</p>"
    ten = math.log(10)
    verdict = (
        "The network is contractive: no two inputs are moved apart."
        if bound.contractive
        else "The network is not certified to be contractive."
    )
    text = (
        f"<p>log10 of the bound: {bound.log_bound / ten:.2f}; with normalisations folded into the weights: "
        f"{bound.log_folded / ten:.2f}. {verdict} This is the network in evaluation mode, with the running "
        "statistics as they are now: after a few steps of training they say little. A weight decay of the order of "
        "1e-3 shrinks the factors of the layers (arXiv 1708.00631).</p>"
    )
    notes = "".join(f"<p class='rule'>{escape(note)}</p>" for note in bound.notes)
    finite = math.isfinite(bound.log_bound)
    caption = "Factors of the operations, alone and after folding; those of 1 are left out."
    return text + notes + (figure(bound, caption) if finite else "")


def _thresholds() -> str:
    rows = [
        ["gradient, first against last layer", f"{rules.ENERGY_DECADES:g} decades of squared gradient"],
        ["scale of the layers' outputs", f"factor {rules.SCALE:g}"],
        ["saturation, ReLU and its kin", f"{100 * rules.SATURATED['ReLU']:g} % of the values"],
        ["saturation, bounded activations", f"{100 * rules.SATURATED_BOUNDED:g} % of the values"],
        ["dead units", f"{100 * rules.DEAD:g} %"],
        [f"κ{100 * rules.P:g} % of the inputs", f"{rules.KAPPA:g}"],
        ["share of the inputs along one direction", f"{100 * rules.ONE_DIRECTION:g} %"],
        ["largest curvature, between layers", f"factor {rules.CURVATURE:g}"],
        ["weight domination, ∂W / W", f"{DOMINATED:g}"],
        ["residual in the image of a block", f"{100 * rules.IMAGE:g} %"],
    ]
    return table(["measured", "threshold"], rows)
