"""The small network 784-128-128-10 on MNIST, ReLU, no normalisation; SGD2, SGD and Adam from one start.

Raw pixels less their mean, weights normal of deviation 0.01, the rate selected as in arXiv 1708.00631 at epoch 1 and
every tenth after.  The crosses are an independent implementation in numpy on all 60 000 images.
"""

from benchmarks.training import compare
from consistency_ops.nn import deep_mlp

TITLE = "small MLP on MNIST, SGD2 against SGD and Adam"
DATA = "mnist"
SETTINGS = {name: {"optimizer": name} for name in ("sgd2", "sgd", "adam")}
SIZE = {"epochs": 10, "train": 20_000, "test": 10_000, "batch": 500}
NUMPY = {
    "sgd2": {1: 0.0333, 5: 0.0219, 10: 0.0211},
    "sgd": {1: 0.0436, 5: 0.0219, 10: 0.0219},
    "adam": {1: 0.0525, 5: 0.0403, 10: 0.0438},
}


def run(settings, size, seed, data, tick):
    model = deep_mlp(784, 10, width=128, depth=2, normalization="none", seed=seed)
    return compare.run(model, settings, size, seed, data, tick)


def plot(figure, results):
    images = next(iter(results.values()))[0]["size"]["train"]
    compare.curves(figure, results, NUMPY, "numpy, 60 000 images")
    figure.suptitle(f"784-128-128-10 on {images} MNIST images, batch 500")


lines = compare.lines
