"""Readers for the published file formats: idx, the two CIFAR-10 batch formats, and folders of images.

Every reader returns ``(images, labels)``: uint8 ``(N, C, H, W)`` and int64 ``(N,)`` numpy arrays. A file that is not
what it should be raises :class:`DataError`, whose text names the file and the cure.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..ops.checks import type_name
from .errors import DataError

try:
    import lzma

    _LZMA_ERROR: type[Exception] = lzma.LZMAError
except ImportError:  # a Python built without liblzma cannot raise it
    _LZMA_ERROR = tarfile.ReadError

Arrays = tuple[np.ndarray, np.ndarray]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_IDX_MAGIC = {3: 0x00000803, 1: 0x00000801}  # unsigned bytes; the last byte is the number of dimensions
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_RECORD = 1 + 3 * 32 * 32  # one label byte, then the red, green and blue planes
_AGAIN = "delete it and fetch it again"
_LEFT_BEHIND = frozenset(
    {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
)


def check_labels(labels: np.ndarray, count: int, classes: int, source: object) -> np.ndarray:
    """Return the labels as int64 after checking that there are ``count`` of them, all in ``[0, classes)``."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{source}: labels must be a list of whole numbers, got {labels.dtype} of shape {labels.shape}; {_AGAIN}."
        )
    if len(labels) != count:
        raise DataError(f"{source}: {len(labels)} labels for {count} images; the two do not belong together, {_AGAIN}.")
    if count and not (labels.min() >= 0 and labels.max() < classes):
        raise DataError(f"{source}: labels must be in [0, {classes}), got {labels.min()} to {labels.max()}; {_AGAIN}.")
    return labels.astype(np.int64)


# ---- idx (MNIST, Fashion-MNIST)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file, plain or gzipped, with 1 dimension (labels) or 3 (images), as a uint8 array."""
    raw = _read_maybe_gzip(path)
    header = 4 + 4 * dimensions
    magic = int.from_bytes(raw[:4], "big")
    if len(raw) < header or magic != _IDX_MAGIC[dimensions]:
        kind = "images" if dimensions == 3 else "labels"
        raise DataError(
            f"{path}: an idx file of {kind} starts with {_IDX_MAGIC[dimensions]:#010x}, got {magic:#010x} "
            f"in {len(raw)} bytes; {_AGAIN}."
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dimensions, offset=4))
    if 0 in shape[1:]:
        raise DataError(f"{path}: images must have pixels, got {shape[1]} x {shape[2]}; {_AGAIN}.")
    expected = int(np.prod(shape, dtype=object))
    if len(raw) - header != expected:
        raise DataError(f"{path}: the header promises {expected} bytes of data, got {len(raw) - header}; {_AGAIN}.")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_idx_pair(images: Path, labels: Path, classes: int) -> Arrays:
    x = read_idx(images, 3)
    return x[:, None], check_labels(read_idx(labels, 1), len(x), classes, labels)


def _read_maybe_gzip(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged or cut short ({error}); {_AGAIN}.") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions."
        ) from None


# ---- CIFAR-10 batches


_ARRAY_GLOBALS = {
    ("_reconstruct", "multiarray"): np.empty(0).__reduce__()[0],
    ("ndarray", "numpy"): np.ndarray,
    ("dtype", "numpy"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds plain containers and numpy arrays and refuses every other global: a pickle can run any code."""

    def find_class(self, module: str, name: str) -> object:
        last = module.rpartition(".")[2]
        if module.split(".")[0] == "numpy" and (name, last) in _ARRAY_GLOBALS:
            return _ARRAY_GLOBALS[name, last]
        if (module, name) == ("_codecs", "encode"):  # protocol 2 stores bytes as text and an encoding
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image batch needs")


def parse_cifar_pickle(raw: bytes, source: object, classes: int = 10) -> Arrays:
    """Read one batch of ``cifar-10-batches-py``; the pickle cannot run code."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{source}: is not a CIFAR-10 python batch ({error}); {_AGAIN}.") from None
    if not isinstance(batch, dict):
        raise DataError(f"{source}: a CIFAR-10 python batch is a dictionary, got {type_name(batch)}; {_AGAIN}.")
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    if not {"data", "labels"} <= fields.keys():
        raise DataError(
            f"{source}: a CIFAR-10 python batch has data and labels, got {sorted(map(str, fields))}; {_AGAIN}."
        )
    data = fields["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_CIFAR_RECORD - 1,):
        what = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type_name(data)
        raise DataError(f"{source}: data must be uint8 of shape (N, {_CIFAR_RECORD - 1}), got {what}; {_AGAIN}.")
    try:
        labels = np.asarray(fields["labels"])
    except ValueError as error:
        raise DataError(f"{source}: labels cannot be read ({error}); {_AGAIN}.") from None
    return data.reshape(-1, *_CIFAR_SHAPE), check_labels(labels, len(data), classes, source)


def parse_cifar_binary(raw: bytes, source: object, classes: int = 10) -> Arrays:
    """Read one batch of ``cifar-10-batches-bin``, which is records of a label byte and 3072 pixel bytes."""
    if not raw or len(raw) % _CIFAR_RECORD:
        raise DataError(
            f"{source}: a CIFAR-10 binary batch is records of {_CIFAR_RECORD} bytes, got {len(raw)} bytes; {_AGAIN}."
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, _CIFAR_RECORD)
    labels = check_labels(records[:, 0], len(records), classes, source)
    return records[:, 1:].reshape(-1, *_CIFAR_SHAPE), labels


def cifar_batch_names(binary: bool) -> tuple[list[str], list[str]]:
    """Return the file names of the training batches and of the test batch."""
    end = ".bin" if binary else ""
    return [f"data_batch_{i}{end}" for i in range(1, 6)], [f"test_batch{end}"]


def read_cifar_batches(read: Callable[[str], bytes], binary: bool, source: object) -> tuple[Arrays, Arrays]:
    """Return training and test set; ``read(name)`` returns the bytes of one batch file."""
    parse = parse_cifar_binary if binary else parse_cifar_pickle
    train, test = ([parse(read(name), f"{source}, {name}") for name in names] for names in cifar_batch_names(binary))
    return _concatenate(train), _concatenate(test)


def _concatenate(parts: list[Arrays]) -> Arrays:
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


# ---- archives and folders of images


def read_tar(path: Path, wanted: Callable[[str], object]) -> dict[str, bytes]:
    """Return the content of the wanted files of a tar archive (any compression); nothing is written to disk."""
    try:
        with tarfile.open(path, "r:*") as archive:
            files = ((m.name, archive.extractfile(m)) for m in archive if m.isfile() and wanted(m.name))
            return {name: file.read() for name, file in files if file is not None}
    except (tarfile.TarError, EOFError, zlib.error, OSError, _LZMA_ERROR) as error:
        raise DataError(f"{path}: the archive is damaged or cut short ({error}); {_AGAIN}.") from None


def image_entry(name: str) -> tuple[str, str] | None:
    """Return ``(part, class)`` of a path that ends in ``train|test/class/file.jpg|png``, else None."""
    pieces = Path(name).parts
    if len(pieces) < 3 or pieces[-3] not in ("train", "test") or any(map(is_hidden, (*pieces[-2:], *pieces[:-3]))):
        return None
    return (pieces[-3], pieces[-2]) if pieces[-1].lower().endswith(IMAGE_SUFFIXES) else None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that other systems leave beside the data: ``._1.png``, ``__MACOSX`` and so on.

    ``.DS_Store``, ``.ipynb_checkpoints`` and the ``._`` files of macOS begin with a dot; ``Thumbs.db`` and
    ``desktop.ini`` of Windows, ``@eaDir`` of network disks do not.
    """
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _LEFT_BEHIND


def eight_bits(image: Any, name: str) -> Any:
    """An image of 16 bits a pixel as one of 8: the upper byte. Pillow's own conversion would clip it, mostly to white.

    Pillow opens grey PNG files of 16 bits as I;16, and older versions of it as I; colours of 16 bits it halves itself.
    """
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() < 2**16:
        raise DataError(f"{name}: pixels must have 8 or 16 bits, got values from {values.min()} to {values.max()}.")
    return Image.fromarray((values >> 8).astype(np.uint8))


def decode_images(
    files: Iterable[tuple[str, str, Callable[[], BinaryIO | Path]]], shape: tuple[int, int, int], class_names: list[str]
) -> Arrays:
    """Decode the images of ``(name, class, open)`` triples, all of ``shape`` (C, H, W) with C 1 (grey) or 3 (RGB)."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("Reading a folder of images needs Pillow; install it with: pip install pillow") from None
    channels, height, width = shape
    files = list(files)
    images = np.empty((len(files), *shape), np.uint8)
    labels = np.empty(len(files), np.int64)
    for i, (name, class_name, open_file) in enumerate(files):
        try:
            with Image.open(open_file()) as image:
                pixels = np.asarray(eight_bits(image, name).convert("L" if channels == 1 else "RGB"))
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
            reason = str(error).partition(" <_io.")[0].partition(" '/")[0]  # the file is named already
            raise DataError(f"{name}: is not a readable image ({reason}); {_AGAIN}.") from None
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{name}: images must be {width} x {height} pixels, got {pixels.shape[1]} x {pixels.shape[0]}; "
                "resize them all to that size."
            )
        images[i] = pixels.reshape(height, width, channels).transpose(2, 0, 1)
        labels[i] = class_names.index(class_name)
    return images, labels
