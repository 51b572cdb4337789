"""The data sets: split, batches, and files that are whole, broken, missing or downloaded."""

import gzip
import hashlib
import io
import socket
import struct
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.datasets import MNIST

from tests.mnist.files import idx, write_mnist
from torch_softmax.mnist.data import BatchLoader, ImageDataset, load_dataset
from torch_softmax.mnist.download import DataError, DataNotFoundError

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"


@pytest.fixture
def raw(tmp_path):
    """The folder of a small MNIST, unpacked."""
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    return folder


def pack(folder):
    """Compress the files in a folder, and return the compressed content of each by its name."""
    packed = {}
    for path in list(folder.iterdir()):
        packed[f"{path.name}.gz"] = gzip.compress(path.read_bytes(), 1)
        path.with_name(f"{path.name}.gz").write_bytes(packed[f"{path.name}.gz"])
        path.unlink()
    return packed


class Mirrors:
    """What each address sends: bytes, or an error to raise while the file is read.

    An address that is not known is refused.
    """

    def __init__(self):
        self.files = {}
        self.asked = []

    @contextmanager
    def open(self, request, **_):
        url = request if isinstance(request, str) else request.full_url
        self.asked.append((url, socket.getdefaulttimeout()))
        content = self.files.get(url, URLError("Connection refused"))
        if isinstance(content, URLError):
            raise content
        response = io.BytesIO(content) if isinstance(content, bytes) else content
        response.length, response.url = None, url
        yield response


class Silent(io.BytesIO):
    def read(self, *_):
        raise TimeoutError("timed out")


@pytest.fixture
def mirrors(raw, monkeypatch):
    """Two mirrors that have a small MNIST, of which the disk has nothing."""
    packed = pack(raw)
    mirrors = Mirrors()
    for name, content in packed.items():
        (raw / name).unlink()
        mirrors.files |= {f"http://one/{name}": content, f"http://two/{name}": content}
    monkeypatch.setattr("urllib.request.urlopen", mirrors.open)
    monkeypatch.setattr(MNIST, "mirrors", ["http://one/", "http://two/"])
    checksums = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr(MNIST, "resources", checksums)
    return mirrors


def load_mnist(folder):
    return load_dataset("mnist", folder.parent.parent)


# The digits


def test_digits_are_all_there(digits):
    labels = torch.cat([digits.train.labels, digits.test.labels])
    expected = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert labels.bincount().tolist() == expected


def test_every_fifth_digit_of_a_class_is_a_test_example(digits):
    file = Path(sys.modules["torch_softmax.mnist"].__file__).parent / "digits" / "digits.csv.gz"
    seen = [0] * 10
    test = []
    for line in gzip.decompress(file.read_bytes()).decode().split():
        *pixels, label = map(int, line.split(","))
        seen[label] += 1
        if seen[label] % 5 == 0:
            test.append(pixels)
    assert digits.test.images.tolist() == test


def test_no_digit_is_in_both_parts(digits):
    parts = [set(map(tuple, part.images.tolist())) for part in (digits.train, digits.test)]
    assert not parts[0] & parts[1]


def test_digits_fill_the_range_of_pixels(digits):
    pixels, _ = digits.train[torch.arange(len(digits.train))]
    assert (pixels.min(), pixels.max()) == (0, 1)


# A data set and its batches


def test_pixels_become_floats_only_when_fetched():
    dataset = ImageDataset(
        torch.tensor([[0, 51], [255, 102]], dtype=torch.uint8), torch.arange(2), 255
    )
    pixels, labels = dataset[torch.tensor([1, 0, 1])]
    assert dataset.images.dtype == torch.uint8
    assert torch.equal(pixels, torch.tensor([[1.0, 0.4], [0.0, 0.2], [1.0, 0.4]]))
    assert labels.tolist() == [1, 0, 1]


def test_each_image_needs_a_label():
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\).*got \(2,\)"):
        ImageDataset(torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(2), 255)


def order(loader):
    return [labels.tolist() for _, labels in loader]


@pytest.fixture
def numbered():
    """Ten examples whose labels are their numbers."""
    return ImageDataset(torch.zeros(10, 1, dtype=torch.uint8), torch.arange(10), 255)


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (99, [10])])
def test_without_a_generator_the_order_is_kept(numbered, batch_size, sizes):
    loader = BatchLoader(numbered, batch_size)
    assert [len(batch) for batch in order(loader)] == sizes
    assert [label for batch in order(loader) for label in batch] == list(range(10))
    assert len(loader) == len(sizes)


def test_each_pass_is_shuffled_anew_from_the_seed_on(numbered):
    first, second = (BatchLoader(numbered, 4, torch.Generator().manual_seed(0)) for _ in range(2))
    passes = [order(first), order(first)]
    assert passes == [order(second), order(second)]
    assert passes[0] != passes[1]
    for batches in passes:
        labels = [label for batch in batches for label in batch]
        assert labels != sorted(labels) == list(range(10))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_needs_an_example(numbered, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        BatchLoader(numbered, batch_size)


# Files in MNIST's format


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"dataset must be 'auto', 'mnist'.*or 'digits', got 'x'"):
        load_dataset("x", "nowhere")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("kmnist", "KMNIST/raw"),
        ("mnist", "."),
        ("auto", "."),
        ("idx", "."),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True], ids=["unpacked", "packed anew"])
def test_files_on_disk_are_read_without_torchvision(tmp_path, monkeypatch, name, folder, is_packed):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it would raise
    folder = tmp_path / "data" / folder
    images = write_mnist(folder)
    if is_packed:
        pack(folder)
    before = sorted(folder.iterdir())
    data = load_dataset(name, tmp_path / "data", notify=pytest.fail)
    assert data.name == ("mnist" if name == "auto" else name)
    assert torch.equal(data.train.images, images.flatten(1))
    assert data.train.labels.tolist() == [*range(10), 0, 1]
    assert len(data.test) == 5
    assert sorted(folder.iterdir()) == before


def test_an_idx_data_set_that_is_not_there(tmp_path):
    message = rf"^idx needs the files {TRAIN_IMAGES}, .* or not, in {tmp_path}$"
    with pytest.raises(DataNotFoundError, match=message):
        load_dataset("idx", tmp_path)


def replace_bytes(start, new):
    return lambda content: content[:start] + new + content[start + len(new) :]


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        (TRAIN_IMAGES, lambda content: content[:-1], "holds 9407 bytes, but .* says 9408"),
        (TRAIN_IMAGES, lambda content: content + b"x", "holds 9409 bytes, but .* says 9408"),
        (TRAIN_IMAGES, lambda content: content[:9], "ends within its header"),
        (TRAIN_IMAGES, lambda content: b"", "ends within its header"),
        (TRAIN_IMAGES, replace_bytes(2, b"\x09"), "has the magic number 2307, not 2051"),
        (TRAIN_IMAGES, lambda content: idx(torch.zeros(0, 28, 28)), "holds 0 images"),
        (
            TRAIN_IMAGES,
            replace_bytes(8, struct.pack(">II", 14, 56)),
            r"holds 12 images of \[14, 56\] pixels",
        ),
        (TEST_LABELS, lambda content: content[:-1], "holds 4 bytes, but .* says 5"),
        (TEST_LABELS, lambda content: idx(torch.zeros(4)), "holds 4 labels for 5 images"),
        (TEST_LABELS, replace_bytes(8, b"\x0a"), "holds the label 10"),
    ],
)
def test_a_broken_file_is_named(raw, name, damage, problem):
    path = raw / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"^{path} {problem}.*: delete it and run again"):
        load_mnist(raw)


def test_a_damaged_archive_is_named(raw):
    path = raw / f"{TRAIN_IMAGES}.gz"
    content = pack(raw)[path.name]
    wrong = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    for broken in (b"half a file", content[:-20], wrong):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=f"^{path} is damaged: delete it and run again"):
            load_mnist(raw)


def test_auto_does_not_pass_over_a_broken_file(raw):
    (raw / TRAIN_LABELS).write_bytes(b"")
    with pytest.raises(DataError, match=TRAIN_LABELS):
        load_dataset("auto", raw.parent.parent)


def test_a_directory_in_the_place_of_a_file_is_named(raw):
    (raw / TRAIN_LABELS).unlink()
    (raw / TRAIN_LABELS).mkdir()
    with pytest.raises(DataError, match=f"^{raw / TRAIN_LABELS} can't be read: Is a directory$"):
        load_mnist(raw)


# Downloads


def test_a_missing_data_set_is_downloaded_from_the_first_mirror_with_a_time_limit(mirrors, raw):
    before = socket.getdefaulttimeout()
    assert len(load_mnist(raw).train) == 12
    assert {path.name for path in raw.iterdir()} == {name for name, _ in MNIST.resources}
    assert {url for url, _ in mirrors.asked} == {f"http://one/{n}" for n, _ in MNIST.resources}
    assert all(limit is not None and limit < 60 for _, limit in mirrors.asked)
    assert socket.getdefaulttimeout() == before


def test_only_what_is_missing_is_downloaded(mirrors, raw):
    name = f"{TRAIN_IMAGES}.gz"
    (raw / name).write_bytes(mirrors.files.pop(f"http://one/{name}"))
    assert len(load_mnist(raw).train) == 12
    assert len({url for url, _ in mirrors.asked}) == 3


@pytest.mark.parametrize("sent", [b"<html>Sign in</html>", Silent(), URLError("no route to host")])
def test_the_next_mirror_is_asked_after_one_that_fails(mirrors, raw, capfd, sent):
    mirrors.files[f"http://one/{TRAIN_LABELS}.gz"] = sent
    assert len(load_mnist(raw).train) == 12
    assert mirrors.asked[-1][0].startswith("http://one/")
    assert capfd.readouterr() == ("", "")


def test_a_failed_download_is_one_line_and_leaves_whole_files_only(mirrors, raw):
    mirrors.files[f"http://one/{TRAIN_LABELS}.gz"] = b"half a file"
    del mirrors.files[f"http://two/{TRAIN_LABELS}.gz"]
    with pytest.raises(DataNotFoundError) as raised:
        load_mnist(raw)
    message = str(raised.value)
    assert message.startswith(f"MNIST is not in {raw} and can't be downloaded (http://one/: ")
    assert "; http://two/: <urlopen error Connection refused>): put its four files" in message
    assert "\n" not in message
    (whole,) = raw.iterdir()
    assert whole.read_bytes() == mirrors.files[f"http://one/{TRAIN_IMAGES}.gz"]


def test_auto_without_mnist_tells_in_one_line_that_it_takes_the_digits(mirrors, raw):
    mirrors.files.clear()
    lines = []
    assert load_dataset("auto", raw.parent.parent, notify=lines.append).name == "digits"
    (line,) = lines
    assert "put its four files there" in line
    assert "training on the embedded 8x8 digits" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["MNIST", "MNIST/raw"])
def test_a_file_in_the_place_of_a_directory_is_named(mirrors, raw, tmp_path, name):
    raw.rmdir()
    raw.parent.rmdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("in the way")
    with pytest.raises(DataNotFoundError, match=f"can't be downloaded .*{tmp_path / name}"):
        load_mnist(raw)
