"""Every published file format is read exactly, and every damaged file gives a sentence that names it."""

import functools
import gzip
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from consistency_ops.cli import data, download
from consistency_ops.cli import data_formats as formats
from consistency_ops.cli.errors import DataError, UserError
from support.data import published

STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def random_images(count, shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), np.uint8), rng.integers(0, 10, count)


# ---- writers of the published formats


def idx(array):
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder, train, test, end=".gz"):
    pack = gzip.compress if end == ".gz" else bytes
    for stem, array in zip(STEMS, (train[0][:, 0], train[1], test[0][:, 0], test[1]), strict=True):
        (folder / (stem + end)).write_bytes(pack(idx(array)))


def pickle_batch(images, labels):
    return pickle.dumps({b"data": images.reshape(len(images), -1), b"labels": [int(y) for y in labels]}, protocol=2)


def binary_batch(images, labels):
    return np.concatenate([np.asarray(labels, np.uint8)[:, None], images.reshape(len(images), -1)], 1).tobytes()


def cifar_files(train, test, binary):
    pack = binary_batch if binary else pickle_batch
    names, (test_name,) = formats.cifar_batch_names(binary)
    parts = zip(np.array_split(train[0], 5), np.array_split(train[1], 5), strict=True)
    return {name: pack(*part) for name, part in zip(names, parts, strict=True)} | {test_name: pack(*test)}


def write_tar(path, files, mode):
    with tarfile.open(path, mode) as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(stream, "PNG")
    return stream.getvalue()


def image_files(train, test):
    """Files of an image folder; the sorted order is by class, then by number."""
    return {
        f"{part}/class{y}/{i:04d}.png": png(x)
        for part, (images, labels) in (("train", train), ("test", test))
        for i, (x, y) in enumerate(zip(images, labels, strict=True))
    }


def assert_holds(images, train, test):
    for x, y, (wanted_x, wanted_y) in (
        (images.train_x, images.train_y, train),
        (images.test_x, images.test_y, test),
    ):
        assert x.dtype == torch.uint8 and y.dtype == torch.int64
        assert np.array_equal(x.numpy(), wanted_x) and np.array_equal(y.numpy(), wanted_y)


# ---- what is read


def test_digits_are_the_real_ones_and_the_split_is_fixed():
    first, again = data.load("digits"), data.load("digits")
    assert first.train_x.shape == (1437, 1, 8, 8) and first.test_x.shape == (360, 1, 8, 8)
    assert torch.equal(first.train_x, again.train_x) and torch.equal(first.test_y, again.test_y)
    assert first.train_x.max() == 16
    assert torch.bincount(torch.cat([first.train_y, first.test_y])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert torch.bincount(first.test_y).min() >= 34  # stratified


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("end", [".gz", ""])
@pytest.mark.parametrize("inner", ["", "raw"])
def test_idx(tmp_path, name, end, inner):
    train, test = random_images(7, (1, 28, 28)), random_images(4, (1, 28, 28), seed=1)
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    write_idx(folder, train, test, end)
    assert_holds(data.load(name, tmp_path), train, test)


@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
@pytest.mark.parametrize("where", ["here", "unpacked", "archive"])
def test_cifar10_batches(tmp_path, binary, where):
    train, test = random_images(11, (3, 32, 32)), random_images(4, (3, 32, 32), seed=1)
    files = cifar_files(train, test, binary)
    folder = f"cifar-10-batches-{'bin' if binary else 'py'}"
    if where == "archive":
        archive = tmp_path / f"cifar-10-{'binary' if binary else 'python'}.tar.gz"
        write_tar(archive, {f"{folder}/{name}": raw for name, raw in files.items()}, "w:gz")
    else:
        target = tmp_path / folder if where == "unpacked" else tmp_path
        target.mkdir(exist_ok=True)
        for name, raw in files.items():
            (target / name).write_bytes(raw)
    assert_holds(data.load("cifar10", tmp_path), train, test)


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_image_folder(tmp_path, name, shape):
    train, test = random_images(9, shape), random_images(6, shape, seed=1)
    train[1][:3], test[1][:3] = (0, 1, 2), (0, 1, 2)
    train[1][3:], test[1][3:] = 2, 1
    for file, raw in image_files(train, test).items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    orders = [np.argsort(labels, kind="stable") for _, labels in (train, test)]
    wanted = [(x[order], y[order]) for (x, y), order in zip((train, test), orders, strict=True)]
    assert_holds(data.load(name, tmp_path), *wanted)


def test_images_in_an_archive_and_a_limit(tmp_path):
    train, test = random_images(9, (3, 32, 32)), random_images(6, (3, 32, 32), seed=1)
    train[1][:], test[1][:] = np.arange(9) % 3, np.arange(6) % 3
    write_tar(tmp_path / "images.tar.xz", image_files(train, test), "w:xz")
    whole = data.load("cifar10", tmp_path)
    assert len(whole.train_x) == 9 and len(whole.test_x) == 6
    few = data.load("cifar10", tmp_path, limit=4)
    assert len(few.train_x) == 4 and len(few.test_x) == 4
    for x, y in zip(few.train_x, few.train_y, strict=True):
        match = (whole.train_x == x).flatten(1).all(1)
        assert match.sum() == 1 and whole.train_y[match] == y


def test_grey_images_of_16_bits_keep_their_upper_byte(tmp_path):
    """Pillow's own conversion clips at 255, so that x-rays and depth maps would be white."""
    rng = np.random.default_rng(0)
    images = {
        f"{part}/{name}/{i}.png": rng.integers(0, 65536, (28, 28)).astype(np.uint16)
        for part in ("train", "test")
        for name in ("cat", "dog")
        for i in range(3)
    }
    for file, pixels in images.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    loaded = data.load("mnist", tmp_path)
    wanted = np.stack([images[f"train/{name}/{i}.png"] >> 8 for name in ("cat", "dog") for i in range(3)])
    assert np.array_equal(loaded.train_x[:, 0].numpy(), wanted)
    (tmp_path / "train/cat/0.png").write_bytes(png(random_images(1, (1, 28, 28))[0][0]))  # depths may be mixed
    assert data.load("mnist", tmp_path).train_x[1:].equal(loaded.train_x[1:])
    path = tmp_path / "train/cat/0.png"
    for mode in ("LA", "RGBA"):
        grey = Image.fromarray(np.full((28, 28), 200, np.uint8)).convert("L")
        grey.convert(mode).save(path)
        assert (data.load("mnist", tmp_path).train_x[0] == 200).all(), mode
    wide = Image.fromarray(np.full((28, 28), 200 << 8, np.int32))  # what older versions of Pillow open
    assert wide.mode == "I" and np.asarray(formats.eight_bits(wide, "a.png")).max() == 200
    with pytest.raises(DataError, match=r"a\.png: pixels must have 8 or 16 bits, got values from 70000 to 70000"):
        formats.eight_bits(Image.fromarray(np.full((28, 28), 70_000, np.int32)), "a.png")


def png_of_16_bits(pixels):
    """Colours (H, W, 3), uint16, which Pillow reads and does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(raw)) + kind + raw + struct.pack(">I", zlib.crc32(kind + raw)) for kind, raw in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_colours_of_16_bits_and_grey_of_16_bits_as_colour(tmp_path):
    rng = np.random.default_rng(0)
    grey, colours = (rng.integers(0, 65536, (32, 32, *last)).astype(np.uint16) for last in ((), (3,)))
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(grey).save(tmp_path / part / "cat" / "0.png")
        (tmp_path / part / "cat" / "1.png").write_bytes(png_of_16_bits(colours))
    loaded = data.load("cifar10", tmp_path).train_x.numpy()
    assert np.array_equal(loaded[0], np.stack([grey >> 8] * 3))
    assert np.array_equal(loaded[1], (colours >> 8).transpose(2, 0, 1))


CLUTTER = {  # what other systems leave in a folder
    "train/.DS_Store": b"\0\0\0\1Bud1",
    "train/class0/.DS_Store": b"\0\0\0\1Bud1",
    "train/class0/._0000.png": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "train/class0/Thumbs.db": b"\xd0\xcf\x11\xe0",
    "train/class0/desktop.ini": b"[.ShellClassInfo]",
    "train/.ipynb_checkpoints/0000-checkpoint.png": b"",
    "test/@eaDir/0000.png": b"",
    "__MACOSX/train/class0/._0000.png": b"\0\5\x16\7",
    "__MACOSX/train/class0/0000.png": b"\0\5\x16\7",
    "._images.tar.xz": b"\0\5\x16\7",
    "readme.txt": b"images",
}


@pytest.mark.parametrize("packed", [False, True])
def test_files_that_other_systems_leave_behind_are_no_images(tmp_path, packed):
    folder = tmp_path / ".cache" / "data"  # hidden itself, which is nobody's concern
    folder.mkdir(parents=True)
    train, test = random_images(6, (3, 32, 32)), random_images(4, (3, 32, 32), seed=1)
    train[1][:], test[1][:] = np.arange(6) % 2, np.arange(4) % 2
    files = CLUTTER | image_files(train, test)
    if packed:
        write_tar(folder / "images.tar.xz", {f"./{name}": raw for name, raw in files.items()}, "w:xz")
        (folder / "._images.tar.xz").write_bytes(b"\0\5\x16\7")
    else:
        for file, raw in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(raw)
    orders = [np.argsort(labels, kind="stable") for _, labels in (train, test)]
    wanted = [(x[order], y[order]) for (x, y), order in zip((train, test), orders, strict=True)]
    assert_holds(data.load("cifar10", folder), *wanted)


def test_limit_keeps_the_same_images_every_time(tmp_path):
    write_idx(tmp_path, random_images(50, (1, 28, 28)), random_images(20, (1, 28, 28)))
    first, again = (data.load("mnist", tmp_path, limit=12) for _ in range(2))
    assert len(first.train_x) == len(first.test_x) == 12
    assert torch.equal(first.train_x, again.train_x) and torch.equal(first.test_y, again.test_y)


def test_scaling():
    x = torch.from_numpy(random_images(5000, (1, 4, 4))[0]) // 2
    standard, raw = data.scaling(x, "standard"), data.scaling(x, "raw")
    assert standard(x).mean(0).abs().max() < 1e-5 and abs(standard(x).var(unbiased=False).item() - 1) < 1e-5
    torch.testing.assert_close(raw(x), x.float() - x.float().mean(0), rtol=0, atol=1e-4)


def test_scaling_of_constant_images_is_finite():
    assert (
        data.scaling(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8), "standard")(torch.zeros(1, 1, 2, 2))
        .isfinite()
        .all()
    )


# ---- what is refused


def damaged_idx():
    train = random_images(6, (1, 28, 28))
    images, labels = idx(train[0][:, 0]), idx(train[1])
    return {
        "a label file in place of images": (0, labels, "starts with 0x00000803, got 0x00000801"),
        "an image file in place of labels": (1, images, "starts with 0x00000801, got 0x00000803"),
        "wrong magic": (0, b"\x89PNG" + images, "starts with 0x00000803, got 0x89504e47"),
        "an empty file": (0, b"", "in 0 bytes"),
        "half a header": (0, images[:10], "in 10 bytes"),
        "truncated": (0, images[:-1], "promises 4704 bytes of data, got 4703"),
        "too long": (1, labels + b"\0", "promises 6 bytes of data, got 7"),
        "truncated gzip": (0, gzip.compress(images)[:-9], "damaged or cut short"),
        "damaged gzip": (0, gzip.compress(images)[:12] + b"\xff" * 40, "damaged or cut short"),
        "a label of 10": (1, idx([10, 0, 1, 2, 3, 4]), r"must be in \[0, 10\), got 0 to 10"),
        "too few labels": (1, idx([0, 1]), "2 labels for 6 images"),
        "no images": (0, idx(np.zeros((0, 28, 28))), "6 labels for 0 images"),
        "no pixels": (0, idx(np.zeros((6, 0, 28))), "images must have pixels, got 0 x 28"),
    }


@pytest.mark.parametrize("what", damaged_idx())
def test_damaged_idx(tmp_path, what):
    index, raw, message = damaged_idx()[what]
    write_idx(tmp_path, random_images(6, (1, 28, 28)), random_images(6, (1, 28, 28)))
    (tmp_path / (STEMS[index] + ".gz")).write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        data.load("mnist", tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "train-"))  # it names the file


@pytest.mark.parametrize("missing", STEMS)
def test_missing_idx_file(tmp_path, missing):
    write_idx(tmp_path, random_images(6, (1, 28, 28)), random_images(6, (1, 28, 28)))
    (tmp_path / (missing + ".gz")).unlink()
    with pytest.raises(DataError, match=missing):
        data.load("mnist", tmp_path)


def test_test_images_of_another_size(tmp_path):
    write_idx(tmp_path, random_images(6, (1, 28, 28)), random_images(6, (1, 20, 20)))
    with pytest.raises(DataError, match="size of the training images"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_folder_and_empty_folder(tmp_path, name):
    with pytest.raises(DataError, match=r"no such folder.*--data-dir.*--download"):
        data.load(name, tmp_path / "absent")
    with pytest.raises(DataError, match="--download"):
        data.load(name, tmp_path)


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran code')",))


def damaged_pickles():
    images, labels = random_images(3, (3, 32, 32))
    flat = images.reshape(3, -1)
    return {
        "code": (pickle.dumps(Evil(), protocol=2), "asks for .*exec, which no image batch needs"),
        "code beside data": (
            pickle.dumps({b"data": flat, b"labels": [1, 2, 3], b"x": Evil()}, protocol=2),
            "asks for .*exec",
        ),
        "truncated": (pickle_batch(images, labels)[:-200], "not a CIFAR-10 python batch"),
        "empty": (b"", "not a CIFAR-10 python batch"),
        "a list": (pickle.dumps([1]), "is a dictionary, got list"),
        "no labels": (pickle.dumps({b"data": flat}), "has data and labels"),
        "a short row": (pickle.dumps({b"data": flat[:, :-1].copy(), b"labels": [1, 2, 3]}, 2), r"shape \(N, 3072\)"),
        "floats": (pickle.dumps({b"data": flat.astype(float), b"labels": [1, 2, 3]}, 2), "must be uint8"),
        "label 10": (pickle_batch(images, [1, 10, 2]), r"in \[0, 10\), got 1 to 10"),
        "label -1": (pickle_batch(images, [1, -1, 2]), r"in \[0, 10\), got -1 to 2"),
        "two labels": (pickle_batch(images, [1, 2]), "2 labels for 3 images"),
        "text labels": (pickle.dumps({b"data": flat, b"labels": ["cat", "dog", "frog"]}, 2), "whole numbers"),
        "ragged labels": (pickle.dumps({b"data": flat, b"labels": [[1], [2, 3], 4]}, 2), "labels"),
    }


@pytest.mark.parametrize("what", damaged_pickles())
def test_damaged_cifar_pickle(what):
    raw, message = damaged_pickles()[what]
    with pytest.raises(DataError, match=message) as caught:
        formats.parse_cifar_pickle(raw, "data_batch_3")
    assert str(caught.value).startswith("data_batch_3: ")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "got 0 bytes"),
        (bytes(3072), "got 3072 bytes"),
        (b"\x0a" + bytes(3072), r"in \[0, 10\), got 10 to 10"),
    ],
)
def test_damaged_cifar_binary(raw, message):
    with pytest.raises(DataError, match=message):
        formats.parse_cifar_binary(raw, "data_batch_1.bin")


@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
def test_missing_cifar_batch(tmp_path, binary):
    files = cifar_files(random_images(10, (3, 32, 32)), random_images(2, (3, 32, 32)), binary)
    end = ".bin" if binary else ""
    for name, raw in files.items():
        if name != f"data_batch_3{end}":
            (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=f"data_batch_3{end}"):
        data.load("cifar10", tmp_path)


def test_damaged_archives(tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    files = cifar_files(random_images(10, (3, 32, 32)), random_images(2, (3, 32, 32)), False)
    write_tar(archive, files, "w:gz")
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: the archive is damaged"):
        data.load("cifar10", tmp_path)
    write_tar(archive, {"readme.txt": b"no batches"}, "w:gz")
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: holds no data_batch_1"):
        data.load("cifar10", tmp_path)
    archive.unlink()
    (tmp_path / "images.tar.xz").write_bytes(b"\xfd7zXZ\x00 and then nothing")
    with pytest.raises(DataError, match=r"images\.tar\.xz: the archive is damaged"):
        data.load("cifar10", tmp_path)


def test_damaged_images(tmp_path):
    files = image_files(random_images(4, (3, 32, 32)), random_images(4, (3, 32, 32)))
    for file, raw in files.items():
        path = tmp_path / file.replace(file.split("/")[1], "cat")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    data.load("cifar10", tmp_path)
    broken = tmp_path / "train" / "cat" / "0001.png"
    whole = broken.read_bytes()
    for raw in (whole[:100], b"", b"GIF"):
        broken.write_bytes(raw)
        with pytest.raises(DataError, match=r"0001\.png: is not a readable image") as caught:
            data.load("cifar10", tmp_path)
        assert str(caught.value).count(str(tmp_path)) == 1
    broken.write_bytes(png(random_images(1, (3, 16, 16))[0][0]))
    with pytest.raises(DataError, match=r"0001\.png: images must be 32 x 32 pixels, got 16 x 16"):
        data.load("cifar10", tmp_path)
    broken.write_bytes(whole)
    (tmp_path / "train" / "cat").rename(tmp_path / "train" / "dog")
    with pytest.raises(DataError, match=r"same.*class folders"):
        data.load("cifar10", tmp_path)


# ---- downloads, from a server on this machine


@pytest.fixture
def server(tmp_path):
    """``(folder, address)``: what is in the folder can be fetched from the address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_download(tmp_path, server, monkeypatch):
    folder, address = server
    (folder / "a.gz").write_bytes(b"right")
    (folder / "b.gz").write_bytes(b"wrong")
    sums = {name: hashlib.md5(b"right").hexdigest() for name in ("a.gz", "b.gz", "c.gz")}
    monkeypatch.setitem(download.FILES, "mnist", (address, sums))
    target, said = tmp_path / "data" / "mnist", []
    with pytest.raises(DataError, match=rf"{address}b\.gz: its md5 sum must be"):
        download.download("mnist", target, said.append)
    assert said == [f"fetching {address}a.gz", f"fetching {address}b.gz"]
    assert [path.name for path in target.iterdir()] == ["a.gz"]  # a wrong file never gets its name

    (folder / "b.gz").write_bytes(b"right")
    with pytest.raises(DataError, match=rf"{address}c\.gz: cannot be fetched .*404.*--data-dir"):
        download.download("mnist", target, said.append)
    (folder / "c.gz").write_bytes(b"right")
    said.clear()
    download.download("mnist", target, said.append)
    assert said == [f"fetching {address}c.gz"]  # what is there is kept

    (target / "a.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"a\.gz: its md5 sum must be .* delete it"):
        download.download("mnist", target, said.append)


def test_download_without_a_network_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(download.FILES, "mnist", ("http://127.0.0.1:9/", {"a.gz": "0" * 32}))
    with pytest.raises(DataError, match=r"cannot be fetched .*--data-dir"):
        download.download("mnist", tmp_path, lambda text: None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        download.download("mnist", tmp_path / "file", lambda text: None)


# ---- the real files, where they are


def test_published_md5_sums_of_mnist():
    folder = published("mnist")
    download.download("mnist", folder, pytest.fail)  # nothing may be fetched: all sums are right


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_idx(name):
    images = data.load(name, published(name))
    assert images.train_x.shape == (60000, 1, 28, 28) and images.test_x.shape == (10000, 1, 28, 28)
    assert torch.bincount(images.test_y).shape == (10,)
    if name == "mnist":
        assert images.train_y[:5].tolist() == [5, 0, 4, 1, 9]
    else:
        assert torch.bincount(images.train_y).tolist() == [6000] * 10


def test_real_cifar10_images():
    images = data.load("cifar10", published("cifar10"), limit=200)
    assert images.train_x.shape == (200, 3, 32, 32) and images.test_x.shape == (200, 3, 32, 32)
    assert len(torch.bincount(images.train_y, minlength=10).nonzero()) == 10
    assert 100 < images.train_x.float().mean() < 140  # the mean of CIFAR-10 is about 121
