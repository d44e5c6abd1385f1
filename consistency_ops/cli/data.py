"""The data sets of the training command, read into memory as uint8 images."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import data_formats as formats
from .data_formats import Arrays
from .errors import DataError, UserError

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")
CLASSES = 10
DIGITS_TEST = 360  # test images of 1797; the published set has no split of its own


@dataclass(frozen=True)
class Images:
    """A training and a test set. Images are uint8 ``(N, C, H, W)``, labels int64 ``(N,)`` in ``[0, classes)``."""

    name: str
    source: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int = CLASSES

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "source": self.source,
            "train_images": len(self.train_x),
            "test_images": len(self.test_x),
            "image_shape": list(self.shape),
            "classes": self.classes,
        }


@dataclass(frozen=True)
class Scaling:
    """Subtracts the training mean of each pixel and multiplies by one factor; the same for every method.

    ``raw`` leaves the pixel units (the experiments of arXiv 1708.00631); ``standard`` divides by the standard
    deviation over all pixels of the training set.
    """

    mean: Tensor  # (1, C, H, W), pixel units
    factor: float
    text: str

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) * self.factor

    def to(self, device: torch.device) -> Scaling:
        return Scaling(self.mean.to(device), self.factor, self.text)


def scaling(train_x: Tensor, kind: str) -> Scaling:
    """Return the :class:`Scaling` of ``kind`` ("raw" or "standard") for these training images."""
    total = torch.zeros(train_x.shape[1:], dtype=torch.float64)
    squares = 0.0
    for part in torch.split(train_x, 4096):  # float64 copies of a whole CIFAR-10 would take 1.2 GB
        part = part.double()
        total += part.sum(0)
        squares += float(part.square().sum())
    mean = total / len(train_x)
    variance = squares / train_x.numel() - float(mean.square().mean())  # about the mean of each pixel
    centred = mean.float().unsqueeze(0)
    if kind == "raw":
        return Scaling(centred, 1.0, "pixel values minus their training mean, not rescaled")
    deviation = max(variance, 1e-12) ** 0.5
    text = f"pixel values minus their training mean, divided by {deviation:.4g}, the standard deviation of all"
    return Scaling(centred, 1.0 / deviation, text)


def load(name: str, directory: Path | None = None, *, limit: int | None = None) -> Images:
    """Read the data set ``name``.

    ``directory`` holds the published files in any of their formats (not used for digits). ``limit`` keeps a fixed
    random choice of at most that many training and that many test images. Raises :class:`DataError` when a file is
    missing or damaged.
    """
    if name == "digits":
        train, test, source = _digits()
    else:
        directory = Path("data", name) if directory is None else Path(directory)
        if not directory.is_dir():
            raise DataError(
                f"{directory}: there is no such folder; pass --data-dir with the folder that holds {name}, "
                "or --download where there is a network."
            )
        train, test, source = (_cifar10 if name == "cifar10" else _idx)(name, directory, limit)
    for part, (x, _) in (("training", train), ("test", test)):
        if not len(x):
            raise DataError(f"{source}: there are no {part} images; fetch the data set again.")
    train_x, train_y, test_x, test_y = (
        torch.from_numpy(np.require(a, requirements=("C", "W")))
        for pair in (train, test)
        for a in _choose(*pair, limit)
    )
    return Images(name, source, train_x, train_y, test_x, test_y)


def _choose(x: np.ndarray, y: np.ndarray, limit: int | None) -> Arrays:
    if limit is None or limit >= len(x):
        return x, y
    keep = np.sort(np.random.default_rng(0).permutation(len(x))[:limit])
    return x[keep], y[keep]


def _digits() -> tuple[Arrays, Arrays, str]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError(
            "The default data, real handwritten digits, come with scikit-learn; "
            "install it with: pip install scikit-learn (or choose --data mnist|fashion-mnist|cifar10)."
        ) from None
    digits = load_digits()
    x = digits.images.astype(np.uint8)[:, None]  # whole numbers 0..16
    train_x, test_x, train_y, test_y = train_test_split(
        x, digits.target.astype(np.int64), test_size=DIGITS_TEST, random_state=0, stratify=digits.target
    )
    return (train_x, train_y), (test_x, test_y), "scikit-learn, load_digits; fixed stratified split"


def _idx(name: str, directory: Path, limit: int | None) -> tuple[Arrays, Arrays, str]:
    folders = [directory, directory / name, directory / "raw"]
    folders.append(directory / ("MNIST" if name == "mnist" else "FashionMNIST") / "raw")
    stems = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    found = [_first_file(folders, [stem + ".gz", stem, stem.replace("-idx", ".idx")]) for stem in stems]
    if all(path is None for path in found):
        folder = _image_folder(directory, (1, 28, 28), limit)
        if folder is not None:
            return folder
    paths = [path for path in found if path is not None]
    if len(paths) < len(stems):
        raise DataError(
            f"{directory / stems[found.index(None)]}[.gz]: there is no such file; put the four published {name} files "
            "there, or pass --download where there is a network."
        )
    train, test = (formats.read_idx_pair(images, labels, CLASSES) for images, labels in (paths[:2], paths[2:]))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{paths[2]}: images must have the size of the training images, got {test[0].shape[2:]} "
            f"against {train[0].shape[2:]}; the files do not belong together."
        )
    return train, test, f"idx files {', '.join(path.name for path in paths)}"


def _cifar10(name: str, directory: Path, limit: int | None) -> tuple[Arrays, Arrays, str]:
    for binary, inner in ((False, "cifar-10-batches-py"), (True, "cifar-10-batches-bin")):
        first = formats.cifar_batch_names(binary)[0][0]
        for folder in (directory / inner, directory):
            if (folder / first).is_file():
                return *formats.read_cifar_batches(partial(_batch_file, folder), binary, folder), f"files of {inner}"
        archive = directory / f"cifar-10-{'binary' if binary else 'python'}.tar.gz"
        if archive.is_file():
            files = {Path(k).name: v for k, v in formats.read_tar(archive, lambda name: "_batch" in name).items()}
            return *formats.read_cifar_batches(partial(_batch_member, archive, files), binary, archive), archive.name
    images = _image_folder(directory, (3, 32, 32), limit) or _image_archive(directory, (3, 32, 32), limit)
    if images is not None:
        return images
    raise DataError(
        f"{directory}: holds no CIFAR-10 that can be read (cifar-10-python.tar.gz, cifar-10-binary.tar.gz, their "
        "unpacked folders, or images in train|test/class/); pass --data-dir, or --download where there is a network."
    )


def _batch_file(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise DataError(
            f"{folder / name}: cannot be read ({error.strerror or error}); CIFAR-10 is five training and one test "
            "batch, fetch it again."
        ) from None


def _batch_member(archive: Path, files: dict[str, bytes], name: str) -> bytes:
    if name not in files:
        raise DataError(f"{archive}: holds no {name}; it is not the published archive, fetch it again.")
    return files[name]


def _image_folder(directory: Path, shape: tuple[int, int, int], limit: int | None) -> tuple[Arrays, Arrays, str] | None:
    names = [
        name
        for part in ("train", "test")
        for path in sorted(directory.glob(f"{part}/*/*"))
        if formats.image_entry(name := str(path.relative_to(directory)))
    ]
    if not names:
        return None
    return *_decode(names, lambda name: directory / name, shape, limit, directory), "images in train|test/class/"


def _image_archive(
    directory: Path, shape: tuple[int, int, int], limit: int | None
) -> tuple[Arrays, Arrays, str] | None:
    archives = (
        (path, formats.read_tar(path, formats.image_entry))
        for path in sorted(directory.glob("*.tar*"))
        if not formats.is_hidden(path.name)
    )
    archive, files = next((pair for pair in archives if pair[1]), (directory, {}))
    if not files:
        return None
    train, test = _decode(sorted(files), lambda name: io.BytesIO(files[name]), shape, limit, archive)
    return train, test, f"images in {archive.name}"


def _decode(
    names: list[str], open_file: Callable[[str], Any], shape: tuple[int, int, int], limit: int | None, source: Path
) -> tuple[Arrays, Arrays]:
    """Return the training and test images; only those that ``limit`` keeps are decoded."""
    parts: dict[str, list[tuple[str, str, Callable[[], Any]]]] = {"train": [], "test": []}
    for name in names:
        entry = formats.image_entry(name)
        assert entry is not None  # the names are those of images
        part, class_name = entry
        parts[part].append((f"{source}, {name}", class_name, partial(open_file, name)))
    classes = {part: sorted({class_name for _, class_name, _ in entries}) for part, entries in parts.items()}
    if classes["train"] != classes["test"] or len(classes["train"]) > CLASSES:
        raise DataError(
            f"{source}: train and test must hold the same, at most {CLASSES}, class folders, got {classes['train']} "
            f"and {classes['test']}."
        )
    decoded = []
    for entries in parts.values():
        order = np.arange(len(entries))
        chosen = [entries[i] for i in _choose(order, order, limit)[0]]
        decoded.append(formats.decode_images(chosen, shape, classes["train"]))
    return decoded[0], decoded[1]


def _first_file(folders: list[Path], names: list[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)
