"""Rules that turn measurements into advice: each has one threshold and names the number that crossed it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .activation_statistics import ActivationStatistics
from .conditioning import Conditioning, LayerConditioning
from .gradient_energy import GradientEnergy
from .lipschitz import LipschitzBound
from .propagation import BlockPropagation, Propagation
from .results import Result
from .roles import comparable
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
CLOSED = 1e-3  # largest magnitude of a vector of scales that closes a branch; layer scales begin at 1e-6 to 1e-4
ROWS = 2  # rows a unit, from which on a condition number is judged
WIDENS = 10.0  # outputs / inputs of a block that is wide for its own sake
SOME, MANY = (
    20,
    256,
)  # values of a unit that are needed to call it dead: of real inputs, of random ones, which are alike
HELPS = 10.0  # a remedy must lower a condition number by this factor to be named


_ENERGY_RULE = (
    f"|log10 of the ratio of squared gradients, first to last layer of one role, in most roles| < {ENERGY_DECADES:g}"
)


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
    zero_scales: list[str]  #: modules whose weight is 0 and gets a gradient, such as the last norm of a residual block
    synthetic: bool  #: whether the inputs are random numbers
    failed: dict[str, str]  #: what could not be measured, by the name of the part, and why


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
        *_gradient(energy, measured.zero_scales),
        _signal(statistics, {layer.name for layer in energy.layers}),
        *_saturation(statistics),
        _dead(statistics, MANY if measured.synthetic else SOME),
        _conditioning(conditioning, measured.synthetic),
        None if measured.synthetic else _direction(conditioning),
        _curvature(conditioning, _positions(statistics, measured.samples)),
        _domination(measured.domination, measured.zero_scales),
        _image(measured.propagation),
        None if measured.synthetic else _rows(conditioning),
    ]
    return sorted((f for f in found if f is not None), key=lambda f: -f.severity)


def _names(layers: list[str], most: int = 6) -> str:
    shown = ", ".join(layers[:most])
    return shown if len(layers) <= most else f"{shown} and {len(layers) - most} more"


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor < 1e5 else f"{factor:.1e}"


def _gradient(energy: GradientEnergy, zero_scales: list[str]) -> list[Finding]:
    """The first against the last layer of every role, by the length of the gradient of one sample."""
    alive = [layer for layer in energy.layers if not math.isnan(layer.norm[-1])]
    if len(alive) < 2:
        return []
    found, silent = [], [layer.name for layer in alive if layer.norm[-1] == 0]
    if len(silent) == len(alive):
        text = f"No gradient arrives anywhere: it is 0 at {alive[-1].name}."
        return [
            Finding(
                3, "No gradient", [alive[-1].name], text, _ENERGY_RULE, "Check that the loss depends on the output."
            )
        ]
    closed = [name for name in silent if _in_branch(name, zero_scales)]
    dark = [name for name in silent if name not in closed]
    if dark:
        text = f"The gradient is exactly 0 at {_names(dark)}."
        advice = "A layer above passes nothing on: see dead units and saturation; or it is detached from the loss."
        found.append(Finding(3, "No gradient", dark, text, "a gradient arrives at every layer", advice))
    if zero_scales:
        inside = closed or [x.name for x in alive if _in_branch(x.name, zero_scales)]
        text = (
            f"{len(zero_scales)} branches are scaled by 0 or nearly so ({_names(zero_scales, 3)}), so that "
            f"{len(inside)} layers get no gradient or a very small one in this step."
        )
        advice = (
            "This is how residual blocks with a zero or small initial scale begin, and the scales themselves do get a "
            "gradient. In a trained network these branches would be switched off."
        )
        rule = f"no weight is 0, and no scale of channels at most {CLOSED:g}"
        found.append(Finding(1, "Branches that are still closed", inside, text, rule, advice))
    step = typical_step(energy)
    if step is None:
        return found
    ratio, first, last = step
    decades = -2 * math.log10(ratio)
    if decades > ENERGY_DECADES:
        text = f"From {last} back to {first} the gradient becomes {_times(10 ** (decades / 2))} times smaller."
        advice = (
            "Bring all layer inputs to one scale: BatchRMSNorm before every weight layer but the first; or initial "
            "weights that keep the scale (variance 2 / fan-in for ReLU, 1 / fan-in for the modulus and tanh), "
            "residual connections, or ROAFeedForward. Preconditioning with normalisation restores the step sizes of "
            "the lower layers."
        )
        found.append(Finding(3, "Vanishing gradient", [first], text, _ENERGY_RULE, advice))
    if decades < -ENERGY_DECADES:
        text = f"From {last} back to {first} the gradient becomes {_times(10 ** (-decades / 2))} times larger."
        advice = (
            "The weights are too large for this depth: smaller initial weights, BatchRMSNorm before the weight "
            "layers, weight decay, and until then gradient clipping."
        )
        found.append(Finding(3, "Exploding gradient", [first], text, _ENERGY_RULE, advice))
    return found


def typical_step(energy: GradientEnergy) -> tuple[float, str, str] | None:
    """(length of a sample's gradient at the first layer of a role over that at the last, their names), of the middle
    role: what most roles show is the depth.
    """
    steps = []
    for group in comparable([layer for layer in energy.layers if layer.norm[-1] > 0]):
        first, last = group[0], group[-1]
        steps.append((first.norm[-1] / last.norm[-1], first.name, last.name))
    return sorted(steps)[len(steps) // 2] if steps else None


def _in_branch(name: str, zero_scales: list[str]) -> bool:
    """Whether a layer is in a branch that a scale of 0, or nearly so, closes."""
    return any(name.startswith(_parent(scale)) for scale in zero_scales)


def _parent(name: str) -> str:
    """The block that a module belongs to, with the dot behind it; of a module at the top the module itself."""
    return name.rpartition(".")[0] + "." if "." in name else name


def _signal(statistics: ActivationStatistics, weighted: set[str]) -> Finding | None:
    layers = [layer for layer in statistics.layers if layer.name in weighted and layer.rms[-1] > 0]
    pairs = [
        (min(group, key=lambda layer: layer.rms[-1]), max(group, key=lambda layer: layer.rms[-1]))
        for group in comparable(layers)
    ]
    small, large = max(pairs, key=lambda pair: pair[1].rms[-1] / pair[0].rms[-1], default=(None, None))
    if small is None or large is None or large.rms[-1] / small.rms[-1] < SCALE:
        return None
    text = (
        f"Outputs have a root mean square of {small.rms[-1]:.2g} at {small.name} and {large.rms[-1]:.2g} at "
        f"{large.name}: a factor {_times(large.rms[-1] / small.rms[-1])}."
    )
    advice = (
        "Layers on different scales need different learning rates and dampings. BatchRMSNorm (or another "
        "normalisation) before the weight layers gives them one; so do scale-keeping initial weights."
    )
    rule = f"largest / smallest root mean square of the outputs of layers of one role < {SCALE:g}"
    return Finding(2, "Signals of different scale", [small.name, large.name], text, rule, advice)


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


def _dead(statistics: ActivationStatistics, rows: int) -> Finding | None:
    layers = [
        (x.name, x.dead[-1])
        for x in statistics.layers
        if x.dead[-1] > DEAD and not math.isnan(x.saturation[-1]) and x.rows[-1] >= rows
    ]
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
        2,
        "Dead units",
        [n for n, _ in layers],
        text,
        f"dead units of an activation <= {100 * DEAD:g} % (of at least {rows} values a unit)",
        advice,
    )


def is_full(layer: LayerConditioning) -> bool:
    """Whether there were enough rows for kappa_80% to say something of the units, and not of the number of rows.

    With as many rows as units that of white noise is about 40, with twice as many below 10.
    """
    return layer.rows[-1] >= ROWS * len(layer.spectrum("input"))


def _conditioning(conditioning: Conditioning, synthetic: bool) -> Finding | None:
    rows = MANY if synthetic else 0
    bad = [
        x
        for x in conditioning.layers
        if x.input[-1] and is_full(x) and x.rows[-1] >= rows and x.kappa("input", P) > KAPPA
    ]
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
        which for which, value in after.items() if (value < KAPPA if before == math.inf else before / value > HELPS)
    ]
    best = min(after, key=after.__getitem__)
    if not useful and before == math.inf:
        tail = f"They span {worst.rank()} of {len(worst.spectrum('input'))} dimensions: there is nothing to rescale."
    elif not useful:
        tail = "None lowers it tenfold here."
    else:
        # Take the cheapest useful remedy, unless another one is ten times better.
        choice = useful[0] if after[useful[0]] < HELPS * after[best] else best
        tail = f"Best value for its cost: {texts[choice]}."
    text = (
        f"{len(bad)} of {len(conditioning.layers)} layers have inputs with kappa_{100 * P:g}% above {_times(KAPPA)}; "
        f"worst {worst.name} with {_kappa(before)}."
    )
    left = f"layers with fewer than {ROWS} rows a unit are left out"
    rule = f"kappa_{100 * P:g}% of the layer inputs <= {_times(KAPPA)} ({left})"
    advice = f"Gradient descent crawls along the weak directions. Measured for {worst.name}: {tried}. {tail}"
    severity = 2 if 10 * len(bad) >= len(conditioning.layers) and not synthetic else 1
    return Finding(severity, "Ill-conditioned inputs", [x.name for x in bad], text, rule, advice)


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


def _positions(statistics: ActivationStatistics, samples: int) -> dict[str, float]:
    """Pixels of one sample at every convolution.

    The gradients of a convolution are multiplied by all rows, and a weight's gradient is a sum over the pixels: of the
    two factors of curvature that this makes, one is too many. Where the tokens are the samples of the loss, none is.
    """
    return {
        layer.name: max(1.0, layer.rows[-1] / max(1, samples))
        for layer in statistics.layers
        if layer.rows and layer.kind.startswith("Conv") and layer.kind != "Conv1D"
    }


def _curvature(conditioning: Conditioning, positions: dict[str, float]) -> Finding | None:
    def curvature(layer: LayerConditioning) -> float:
        return layer.fisher_lambda_max() / positions.get(layer.name, 1.0)

    worst: tuple[float, LayerConditioning, LayerConditioning] | None = None
    layers = [x for x in conditioning.layers if x.gradient[-1] and x.input[-1] and x.fisher_lambda_max() > 0]
    for group in comparable(layers):
        steep, flat = max(group, key=curvature), min(group, key=curvature)
        ratio = curvature(steep) / curvature(flat)
        if ratio >= CURVATURE and (worst is None or ratio > worst[0]):
            worst = ratio, steep, flat
    if worst is None:
        return None
    ratio, steep, flat = worst
    high, low = curvature(steep), curvature(flat)
    text = (
        f"The largest curvature (Fisher block, estimated) is {high:.2g} at {steep.name} and {low:.2g} at {flat.name}: "
        f"one learning rate for both must stay below about {2 / high:.2g}, which is {_times(ratio)} times too small "
        f"for {flat.name}."
    )
    advice = (
        "Normalise the layer inputs, and precondition (scaling='trace'), or use an optimizer with a rate for each "
        "layer."
    )
    rule = f"largest / smallest lambda_max(Sigma_x) lambda_max(Sigma_g) of layers of one role < {_times(CURVATURE)}"
    return Finding(2, "No common learning rate", [steep.name, flat.name], text, rule, advice)


def _domination(domination: WeightDomination, zero_scales: list[str]) -> Finding | None:
    bad = [x for x in domination.layers if 0 < x.ratio() < DOMINATED and not _in_branch(x.name, zero_scales)]
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
    lost = [b for b in propagation.blocks if loses_residual(b)]
    if not lost:
        return None
    worst = min(lost, key=lambda b: b.image_fraction)
    wide = worst.outputs > worst.inputs
    text = (
        f"Only {100 * worst.image_fraction:.0f} % of the residual at {worst.end} lies in the image of the block that "
        f"begins at {worst.start}; the rest does not reach the layers before it, and no skip connection leads around "
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
    rule = (
        f"image fraction >= {100 * IMAGE:g} % (blocks whose Jacobian was computed whole, without a skip connection, "
        f"that widen less than {WIDENS:g} times or lose more than widening explains)"
    )
    return Finding(1, "Residual outside the image", names, text, rule, advice)


def loses_residual(block: BlockPropagation) -> bool:
    """Whether a block that nothing leads around keeps the residual from the layers before it.

    Lanczos tells singular values from 0 only coarsely. A block that widens n times loses all but 1 / n of a random
    residual, which is how bottlenecks are built: 4 to 6 times is no fault.
    """
    if block.method != "exact" or block.bypassed or not block.image_fraction < IMAGE:
        return False
    widened = block.outputs / block.inputs
    return not 1 < widened < WIDENS or block.image_fraction < IMAGE / widened


def _rows(conditioning: Conditioning) -> Finding | None:
    measured = [x for x in conditioning.layers if x.input[-1]]
    few = [x.name for x in measured if not is_full(x)]
    if not few or 2 * len(few) < len(measured):  # single layers are marked in the table
        return None
    text = f"Fewer than {ROWS} rows a unit at {_names(few)}: their condition numbers say little."
    rule = f"rows (samples, tokens, pixels) >= {ROWS} units in more than half of the layers"
    return Finding(1, "Too few samples to judge", few, text, rule, "Give more samples.")
