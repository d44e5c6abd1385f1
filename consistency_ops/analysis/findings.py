"""Rules that turn measurements into advice: each has one threshold and names the number that crossed it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .activation_statistics import ActivationStatistics
from .conditioning import Conditioning, LayerConditioning
from .gradient_energy import GradientEnergy
from .lipschitz import LipschitzBound
from .propagation import Propagation
from .results import Result
from .weight_domination import DOMINATED, WeightDomination

P = 0.8
# Thresholds. They are judgements, not theorems; the page prints them.
ENERGY_DECADES = 4.0  # decades of squared gradient between first and last weight layer: a factor of 100 in size
SCALE = 100.0  # ratio of the largest to the smallest root mean square of the layers' outputs
SATURATED = {"ReLU": 0.9, "ReLU6": 0.9, "Softplus": 0.9, "GELU": 0.9, "SiLU": 0.9, "ELU": 0.9}
SATURATED_BOUNDED = 0.3  # tanh, sigmoid and their kin
DEAD = 0.1  # share of dead units
KAPPA = 1e3  # kappa_80% of the inputs of a layer
ONE_DIRECTION = 0.9  # share of the mean square of a layer's inputs along one eigenvector
CURVATURE = 1e4  # ratio of the largest Fisher eigenvalues of two layers
IMAGE = 0.3  # share of the residual in the image of the block
HELPS = 10.0  # a remedy must lower a condition number by this factor to be named


@dataclass(frozen=True)
class Measurements(Result):
    """What all monitors measured in one network on one batch."""

    model: str
    parameters: int
    mode: str
    samples: int
    loss: float  #: NaN if it is not finite
    statistics: ActivationStatistics
    energy: GradientEnergy
    conditioning: Conditioning
    domination: WeightDomination
    propagation: Propagation
    lipschitz: LipschitzBound | None
    no_lipschitz: str  #: why there is no bound


@dataclass(frozen=True)
class Finding(Result):
    """One problem. ``severity``: 3 prevents training, 2 slows it down, 1 is worth knowing."""

    severity: int
    title: str
    layers: list[str]
    measured: str
    rule: str
    advice: str

    def __str__(self) -> str:
        return f"[{'?!!!'[self.severity] * self.severity}] {self.title}: {self.measured} {self.advice}"


def find(measured: Measurements, finite: bool) -> list[Finding]:
    """Return the findings, the most serious ones first; ``finite`` says whether the network's output is."""
    statistics, energy, conditioning = measured.statistics, measured.energy, measured.conditioning
    if not finite or not math.isfinite(measured.loss):
        broken = next((layer.name for layer in statistics.layers if not math.isfinite(layer.rms[-1])), "the output")
        text = f"The output or the loss is not a finite number; the first layer with a bad output is {broken}."
        advice = "Look for a division by 0, a logarithm of 0, or weights that a diverged training left behind."
        return [Finding(3, "Not a number", [broken], text, "every value is finite", advice)]
    found = [
        _gradient(energy),
        _signal(statistics, {layer.name for layer in energy.layers}),
        *_saturation(statistics),
        _dead(statistics),
        _conditioning(conditioning),
        _direction(conditioning),
        _curvature(conditioning),
        _domination(measured.domination),
        _image(measured.propagation),
        _rows(conditioning),
    ]
    return sorted((f for f in found if f is not None), key=lambda f: -f.severity)


def _names(layers: list[str], most: int = 6) -> str:
    shown = ", ".join(layers[:most])
    return shown if len(layers) <= most else f"{shown} and {len(layers) - most} more"


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor < 1e5 else f"{factor:.1e}"


def _gradient(energy: GradientEnergy) -> Finding | None:
    alive = [(layer.name, layer.energy[-1]) for layer in energy.layers if not math.isnan(layer.energy[-1])]
    if len(alive) < 2:
        return None
    (first, low), (last, high) = alive[0], alive[-1]
    rule = f"|log10 of the ratio of squared gradients, first to last weight layer| < {ENERGY_DECADES:g}"
    if high == 0:
        text = f"No gradient arrives anywhere: it is 0 at {last}."
        return Finding(3, "No gradient", [last], text, rule, "Check that the loss depends on the output.")
    if low == 0:
        silent = [name for name, value in alive if value == 0]
        text = f"The gradient is exactly 0 at {_names(silent)}."
        advice = "A layer above passes nothing on: see dead units and saturation; or it is detached from the loss."
        return Finding(3, "No gradient", silent, text, rule, advice)
    decades = math.log10(high) - math.log10(low)
    if decades > ENERGY_DECADES:
        text = f"From {last} back to {first} the gradient becomes {_times(10 ** (decades / 2))} times smaller."
        advice = (
            "Bring all layer inputs to one scale: BatchRMSNorm before every weight layer but the first; or initial "
            "weights that keep the scale (variance 2 / fan-in for ReLU, 1 / fan-in for the modulus and tanh), "
            "residual connections, or ROAFeedForward. Preconditioning with normalisation restores the step sizes of "
            "the lower layers."
        )
        return Finding(3, "Vanishing gradient", [first], text, rule, advice)
    if decades < -ENERGY_DECADES:
        text = f"From {last} back to {first} the gradient becomes {_times(10 ** (-decades / 2))} times larger."
        advice = (
            "The weights are too large for this depth: smaller initial weights, BatchRMSNorm before the weight "
            "layers, weight decay, and until then gradient clipping."
        )
        return Finding(3, "Exploding gradient", [first], text, rule, advice)
    return None


def _signal(statistics: ActivationStatistics, weighted: set[str]) -> Finding | None:
    sizes = [(layer.rms[-1], layer.name) for layer in statistics.layers if layer.name in weighted and layer.rms[-1] > 0]
    if len(sizes) < 2 or max(sizes)[0] / min(sizes)[0] < SCALE:
        return None
    (low, small), (high, large) = min(sizes), max(sizes)
    text = (
        f"Outputs have a root mean square of {low:.2g} at {small} and {high:.2g} at {large}: a factor "
        f"{_times(high / low)}."
    )
    advice = (
        "Layers on different scales need different learning rates and dampings. BatchRMSNorm (or another "
        "normalisation) before the weight layers gives them one; so do scale-keeping initial weights."
    )
    rule = f"largest / smallest root mean square of the weight layers' outputs < {SCALE:g}"
    return Finding(2, "Signals of different scale", [small, large], text, rule, advice)


def _saturation(statistics: ActivationStatistics) -> list[Finding]:
    found: dict[str, list[tuple[str, float]]] = {}
    for layer in statistics.layers:
        if layer.saturation[-1] > SATURATED.get(layer.kind, SATURATED_BOUNDED):
            found.setdefault(layer.kind, []).append((layer.name, layer.saturation[-1]))
    result = []
    for kind, layers in found.items():
        limit = SATURATED.get(kind, SATURATED_BOUNDED)
        worst = max(layers, key=lambda pair: pair[1])
        text = (
            f"{kind} at {_names([n for n, _ in layers])} passes almost no gradient for up to {100 * worst[1]:.0f} % of "
            f"its values ({worst[0]})."
        )
        advice = (
            "Smaller initial weights or biases, a normalisation before it, or the modulus, which is never flat."
            if kind in SATURATED
            else "Smaller weights below it (Glorot's initialisation) or a normalisation before it "
            "keep it off its flat parts; softsign saturates more slowly, the modulus never."
        )
        rule = f"share of {kind} values with a slope below 5 % of the largest <= {100 * limit:g} %"
        result.append(Finding(2, "Saturated activations", [n for n, _ in layers], text, rule, advice))
    return result


def _dead(statistics: ActivationStatistics) -> Finding | None:
    layers = [(x.name, x.dead[-1]) for x in statistics.layers if x.dead[-1] > DEAD and not math.isnan(x.saturation[-1])]
    if not layers:
        return None
    worst = max(layers, key=lambda pair: pair[1])
    text = (
        f"Units that are 0 for every sample: up to {100 * worst[1]:.0f} % ({worst[0]}); at "
        f"{_names([n for n, _ in layers])}."
    )
    advice = (
        "They get no gradient and do not recover. A smaller learning rate, the modulus or a leaky ReLU, or a new start."
    )
    return Finding(
        2, "Dead units", [n for n, _ in layers], text, f"dead units of an activation <= {100 * DEAD:g} %", advice
    )


def _full(layer: LayerConditioning) -> bool:
    """Whether there were at least as many rows as units, so that kappa_80% means something."""
    return layer.rows[-1] >= len(layer.spectrum("input"))


def _conditioning(conditioning: Conditioning) -> Finding | None:
    bad = [x for x in conditioning.layers if x.input[-1] and _full(x) and x.kappa("input", P) > KAPPA]
    if not bad:
        return None
    worst = max(bad, key=lambda x: x.kappa("input", P))
    before = worst.kappa("input", P)
    texts = {
        "normalised": "BatchRMSNorm in front of it",
        "preconditioned": f"Preconditioner(model, optimizer, damping={conditioning.damping:g}, "
        f"chunk={conditioning.chunk})",
        "both": "both together",
    }
    after = {which: worst.kappa(which, P) for which in texts}
    tried = "; ".join(f"{texts[which]}: {_kappa(value)}" for which, value in after.items())
    useful = [
        which for which, value in after.items() if before / value > HELPS or (before == math.inf and value < KAPPA)
    ]
    best = min(after, key=after.__getitem__)
    if not useful:
        tail = "None lowers it tenfold here."
    else:
        # Take the cheapest useful remedy, unless another one is ten times better.
        choice = useful[0] if after[useful[0]] < HELPS * after[best] else best
        tail = f"Best value for its cost: {texts[choice]}."
    text = (
        f"{len(bad)} of {len(conditioning.layers)} layers have inputs with kappa_{100 * P:g}% above {_times(KAPPA)}; "
        f"worst {worst.name} with {_kappa(before)}."
    )
    rule = f"kappa_{100 * P:g}% of the layer inputs <= {_times(KAPPA)} (layers with fewer rows than units are left out)"
    advice = f"Gradient descent crawls along the weak directions. Measured for {worst.name}: {tried}. {tail}"
    return Finding(2, "Ill-conditioned inputs", [x.name for x in bad], text, rule, advice)


def _kappa(value: float) -> str:
    return "infinite" if value == math.inf else f"{value:.2g}" if value < 100 else _times(value)


def _direction(conditioning: Conditioning) -> Finding | None:
    shares = []
    for x in conditioning.layers:
        spectrum = x.spectrum("input")
        if len(spectrum) > 3 and sum(spectrum) > 0 and spectrum[0] / sum(spectrum) > ONE_DIRECTION:
            shares.append((x.name, spectrum[0] / sum(spectrum)))
    if not shares:
        return None
    worst = max(shares, key=lambda pair: pair[1])
    text = (
        f"{100 * worst[1]:.1f} % of the inputs' mean square at {worst[0]} lies along one direction. Layers like this: "
        f"{_names([n for n, _ in shares])}."
    )
    advice = (
        "All samples look nearly alike to these layers, usually because of a common mean. Preconditioner removes it "
        "from the gradient (it does not centre, so the mean counts as a direction); a BatchNorm in front removes it "
        "from the signal, as Huang et al. (2020) do before the last layer."
    )
    rule = f"largest eigenvalue / trace of the input second moment <= {100 * ONE_DIRECTION:g} %"
    return Finding(1, "One direction dominates", [n for n, _ in shares], text, rule, advice)


def _curvature(conditioning: Conditioning) -> Finding | None:
    tops = [(x.fisher_lambda_max(), x.name) for x in conditioning.layers if x.gradient[-1] and x.input[-1]]
    tops = [(top, name) for top, name in tops if top > 0]
    if len(tops) < 2 or max(tops)[0] / min(tops)[0] < CURVATURE:
        return None
    (low, flat), (high, steep) = min(tops), max(tops)
    text = (
        f"The largest curvature (Fisher block, estimated) is {high:.2g} at {steep} and {low:.2g} at {flat}: one "
        f"learning rate for both must stay below about {2 / high:.2g}, which is {_times(high / low)} times too small "
        f"for {flat}."
    )
    advice = (
        "Normalise the layer inputs, and precondition (scaling='trace'), or use an optimizer with a rate for each "
        "layer."
    )
    rule = f"largest / smallest of the layers' lambda_max(Sigma_x) lambda_max(Sigma_g) < {_times(CURVATURE)}"
    return Finding(2, "No common learning rate", [steep, flat], text, rule, advice)


def _domination(domination: WeightDomination) -> Finding | None:
    bad = [x for x in domination.layers if 0 < x.ratio() < DOMINATED]
    if not bad:
        return None
    worst = min(bad, key=lambda x: x.ratio())
    text = (
        f"sigma_max of the gradient is {_times(1 / worst.ratio())} times smaller than that of the weight at "
        f"{worst.name} ({worst.gradient[-1]:.2g} against {worst.weight[-1]:.2g}). Layers like this: "
        f"{len(bad)} of {len(domination.layers)}."
    )
    advice = (
        "A step at an ordinary rate hardly changes such a layer, which looks like a minimum and need not be one (Huang "
        "et al. 2020). Where the loss is still high: smaller initial weights or a smaller first learning rate, weight "
        "decay, and Preconditioner, which undoes small inputs; where the gradient vanishes, see there."
    )
    rule = f"sigma_max(d loss / d W) / sigma_max(W) >= {DOMINATED:g}"
    return Finding(2, "Weight domination", [x.name for x in bad], text, rule, advice)


def _image(propagation: Propagation) -> Finding | None:
    lost = [b for b in propagation.blocks if b.image_fraction < IMAGE]
    if not lost:
        return None
    worst = min(lost, key=lambda b: b.image_fraction)
    wide = worst.outputs > worst.inputs
    text = (
        f"Only {100 * worst.image_fraction:.0f} % of the residual at {worst.end} lies in the image of the block that "
        f"begins at {worst.start}; the rest does not reach the layers before it, unless a skip connection leads around "
        f"the block. Blocks like this: {len(lost)} of {len(propagation.blocks)}."
    )
    advice = (
        f"The block widens from {worst.inputs} to {worst.outputs}, so most residuals cannot pass; a narrower output or "
        "a skip connection helps."
        if wide
        else "Its adjoint has a large kernel: a wider layer or a skip connection around it helps, and the modulus "
        "instead of an activation with flat parts, of which it has none."
    )
    names = [f"{b.start} to {b.end}" for b in lost]
    return Finding(1, "Residual outside the image", names, text, f"image fraction >= {100 * IMAGE:g} %", advice)


def _rows(conditioning: Conditioning) -> Finding | None:
    few = [x.name for x in conditioning.layers if x.input[-1] and not _full(x)]
    if not few:
        return None
    text = f"Fewer rows than units at {_names(few)}: their condition numbers say little."
    rule = "rows (samples, tokens, pixels) >= units"
    return Finding(1, "Too few samples to judge", few, text, rule, "Give more samples.")
