"""The CIFAR-10 network of arXiv 1708.00631's code: 5x5 convolutions of 32, 32 and 64 channels, 4x4, 1x1.

Raw pixels less their mean, weights normal of deviation 0.01, decay 5e-4, no normalisation, no augmentation, the rate
selected as in the paper.  SGD and Muon have not left their plateau after the 30 steps of that search, and diverge later
at the rates that chance lets win there; theirs are the best of 0.1, 0.02 and 0.005, and of 0.05, 0.02, 0.005, 0.002 and
0.0005, after four epochs of 3 000 images instead.  "sgd2, rms" has a batch RMS norm before every layer but the first.
"adam, whiten" is Adam in whitened coordinates, with "both, dct" of the outputs, too, and with cosine coefficients of
kernels; the search finds 0.005 for that, which is too much later, and 0.001 is the best of 0.005, 0.002, 0.001 and
0.0005 after those four epochs by test error (0.002 by training loss).  "muon" is Muon with Adam on the biases.  The
published errors are lost, and the images here are JPEG of quality 75 unless --data-dir holds the published files.

All training images, as in the paper, resumable after every epoch:
    python -m benchmarks.training convnet --train 50000 --test 10000 --epochs 20 --seeds 0 1
        --out benchmarks/results/training/full
"""

from benchmarks.training import compare
from consistency_ops.cli import models

TITLE = "the CIFAR-10 convnet: SGD2 against SGD, Adam, whitened Adam and Muon"
DATA = "cifar10"
SETTINGS = {
    "sgd2": {"optimizer": "sgd2", "normalization": "none", "weight_decay": 5e-4},
    "sgd": {"optimizer": "sgd", "normalization": "none", "weight_decay": 5e-4, "rate": 0.1},
    "adam": {"optimizer": "adam", "normalization": "none"},
    "sgd2, rms": {"optimizer": "sgd2", "normalization": "rms", "weight_decay": 5e-4},
    "adam, whiten": {"optimizer": "adam, whiten", "normalization": "none"},
    "adam, whiten both, dct": {"optimizer": "adam, whiten both, dct", "normalization": "none"},
    "adam, whiten both, dct, rate 0.001": {
        "optimizer": "adam, whiten both, dct",
        "normalization": "none",
        "rate": 0.001,
    },
    "muon": {"optimizer": "muon", "normalization": "none", "rate": 0.002},
}
SIZE = {"epochs": 8, "train": 10_000, "test": 2_000, "batch": 100}


def run(settings, size, seed, data, tick):
    model = models.build("convnet", (3, 32, 32), 10, normalization=settings["normalization"], seed=seed)
    return compare.run(model, settings, size, seed, data, tick)


def plot(figure, results):
    size = next(iter(results.values()))[0]["size"]
    compare.curves(figure, results)
    figure.suptitle(f"CIFAR-10 convnet on {size['train']} images, batch {size['batch']}")


lines = compare.lines
