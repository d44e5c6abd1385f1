"""The deep network of arXiv 1708.00631 on MNIST: twelve weight matrices, 128 wide, ReLU, with and without RMS norms.

Raw pixels less their mean, weights normal of deviation 0.01, the rate selected as in the paper.  The crosses are an
independent implementation in numpy on all 60 000 images.
"""

from benchmarks.training import compare
from consistency_ops.nn import deep_mlp

TITLE = "deep MLP on MNIST, SGD2 against SGD and Adam, and without normalisation"
DATA = "mnist"
SETTINGS = {
    "sgd2": {"optimizer": "sgd2", "normalization": "rms"},
    "sgd": {"optimizer": "sgd", "normalization": "rms"},
    "adam": {"optimizer": "adam", "normalization": "rms"},
    "sgd2, no norm": {"optimizer": "sgd2", "normalization": "none"},
}
SIZE = {"epochs": 10, "train": 20_000, "test": 10_000, "batch": 500}
NUMPY = {
    "sgd2": {1: 0.0432, 5: 0.0245, 10: 0.0224},
    "sgd": {1: 0.3773, 5: 0.1770, 10: 0.1147},
    "adam": {1: 0.1547, 5: 0.0454, 10: 0.0319},
    "sgd2, no norm": {1: 0.8865, 5: 0.8865, 10: 0.8865},
}


def run(settings, size, seed, data, tick):
    model = deep_mlp(784, 10, normalization=settings["normalization"], seed=seed)
    return compare.run(model, settings, size, seed, data, tick)


def plot(figure, results):
    images = next(iter(results.values()))[0]["size"]["train"]
    compare.curves(figure, results, NUMPY, "numpy, 60 000 images")
    figure.suptitle(f"Twelve weight matrices on {images} MNIST images, batch 500")


lines = compare.lines
