"""Downloads of the published data files; a file gets its name after its md5 sum was checked."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from .errors import DataError, UserError

_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"

# name -> (address of the folder, {file: md5})
FILES: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": (
        _MNIST,
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": (
        _FASHION,
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": (_CIFAR, {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),
}

_BLOCK = 1 << 20
_TIMEOUT = 30  # seconds without data


def download(name: str, directory: Path, say: Callable[[str], None] = print) -> None:
    """Download the published files of ``name`` to ``directory``; files there with the right sum are kept."""
    if name not in FILES:
        return  # the digits are part of scikit-learn
    base, sums = FILES[name]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be made ({error.strerror or error}); choose another --data-dir."
        ) from None
    for file, md5 in sums.items():
        target = directory / file
        if target.exists():
            _check(target, md5, target, "delete it and fetch it again, or leave out --download to use it as it is")
            continue
        say(f"fetching {base}{file}")
        part = target.with_name(file + ".part")
        try:
            _fetch(base + file, part)
            _check(part, md5, base + file, "try again, or fetch it elsewhere and pass its folder with --data-dir")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def _check(path: Path, md5: str, what: object, cure: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{what}: cannot be read ({error.strerror or error}); check its permissions.") from None
    if digest.hexdigest() != md5:
        raise DataError(f"{what}: its md5 sum must be {md5}, got {digest.hexdigest()}; {cure}.")


def _fetch(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, path.open("wb") as stream:
            while block := response.read(_BLOCK):
                stream.write(block)
    except (urllib.error.URLError, OSError) as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise DataError(
            f"{url}: cannot be fetched ({reason}); check the network, or fetch the file elsewhere and pass its folder "
            "with --data-dir."
        ) from None
