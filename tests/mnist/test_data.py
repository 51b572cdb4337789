"""The data sets: split, batches, and files that are whole, broken, missing or downloaded."""

import gzip
import hashlib
import os
import struct
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision import datasets
from torchvision.datasets import MNIST

from tests.mnist.files import idx, write_mnist
from torch_softmax.mnist import download, sources
from torch_softmax.mnist.data import (
    DataError,
    DataNotFoundError,
    ImageDataset,
    batch_loader,
    load_dataset,
)

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"
DIGITS_FILE = Path(download.__file__).parent / "digits" / "digits.csv.gz"


@pytest.fixture
def raw(tmp_path):
    """The folder of a small MNIST, unpacked."""
    folder = tmp_path / "MNIST" / "raw"
    write_mnist(folder)
    return folder


@pytest.fixture
def packed(raw, monkeypatch):
    """The folder of a small MNIST, packed and unpacked, whose checksums are known."""
    checksums = []
    for name in download.ARCHIVES:
        archive = gzip.compress(raw.joinpath(name).with_suffix("").read_bytes())
        raw.joinpath(name).write_bytes(archive)
        checksums.append(hashlib.md5(archive).hexdigest())
    monkeypatch.setitem(sources.SOURCES, "mnist", sources.Source("MNIST", tuple(checksums)))
    resources = list(zip(download.ARCHIVES, checksums, strict=True))
    monkeypatch.setattr(MNIST, "resources", resources)
    return raw


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/"])


@pytest.fixture
def mirror(packed, tmp_path_factory, monkeypatch):
    """A server on this machine that has the archives of `packed`; the test's own folder is empty.

    It is the served folder that the test gets.
    """
    served = tmp_path_factory.mktemp("served")
    for path in packed.iterdir():
        if path.suffix == ".gz":
            path.rename(served / path.name)
        else:
            path.unlink()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield served
        server.shutdown()
        thread.join()


def load_mnist(folder):
    return load_dataset("mnist", folder.parent.parent)


def test_data_on_disk_are_loaded_without_torchvision(raw):
    code = (
        "import sys; from torch_softmax.mnist.data import load_dataset; "
        f"load_dataset('mnist', {str(raw.parent.parent)!r}); "
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_archives_and_checksums_are_those_of_torchvision(name):
    source = sources.SOURCES[name]
    expected = getattr(datasets, source.name).resources
    assert list(zip(download.ARCHIVES, source.checksums, strict=True)) == expected


# The digits


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "nowhere")


def test_digits_are_all_there(digits):
    labels = torch.cat([digits.train.labels, digits.test.labels])
    expected = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert labels.bincount().tolist() == expected


def test_every_fifth_digit_of_a_class_is_a_test_example(digits):
    lines = gzip.decompress(DIGITS_FILE.read_bytes()).decode().split()
    seen = [0] * 10
    test = []
    for line in lines:
        *pixels, label = map(int, line.split(","))
        seen[label] += 1
        if seen[label] % 5 == 0:
            test.append(pixels)
    assert digits.test.images.tolist() == test


def test_no_digit_is_in_both_parts(digits):
    train = set(map(tuple, digits.train.images.tolist()))
    test = set(map(tuple, digits.test.images.tolist()))
    assert not train & test


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
def test_the_last_batch_takes_what_is_left(numbered, batch_size, sizes):
    loader = batch_loader(numbered, batch_size)
    assert [len(batch) for batch in order(loader)] == sizes
    assert len(loader) == len(sizes)


def test_without_a_generator_the_order_is_kept(numbered):
    assert order(batch_loader(numbered, 5)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_a_shuffled_pass_has_every_example_once(numbered):
    loader = batch_loader(numbered, 4, torch.Generator().manual_seed(0))
    labels = torch.cat([labels for _, labels in loader]).tolist()
    assert labels != sorted(labels) == list(range(10))


def test_each_pass_is_shuffled_anew(numbered):
    loader = batch_loader(numbered, 4, torch.Generator().manual_seed(0))
    assert order(loader) != order(loader)


def test_the_same_seed_gives_the_same_passes(numbered):
    first, second = (batch_loader(numbered, 4, torch.Generator().manual_seed(0)) for _ in range(2))
    assert [order(first), order(first)] == [order(second), order(second)]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_needs_an_example(numbered, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        batch_loader(numbered, batch_size)


# Files in MNIST's format


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"dataset must be 'auto', 'mnist'.*or 'digits', got 'x'"):
        load_dataset("x", "nowhere")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_unpacked_files_are_read(tmp_path, name, folder):
    images = write_mnist(tmp_path / folder / "raw")
    data = load_dataset(name, tmp_path)
    assert torch.equal(data.train.images, images.flatten(1))
    assert data.train.labels.tolist() == [*range(10), 0, 1]
    assert len(data.test) == 5


def test_auto_takes_mnist_when_it_is_there(raw):
    assert load_dataset("auto", raw.parent.parent, notify=pytest.fail).name == "mnist"


def replace_bytes(start, new):
    return lambda content: content[:start] + new + content[start + len(new) :]


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        (TRAIN_IMAGES, lambda content: content[:-1], "holds 9407 bytes where .* tells of 9408"),
        (TRAIN_IMAGES, lambda content: content + b"x", "holds 9409 bytes where .* tells of 9408"),
        (TRAIN_IMAGES, lambda content: content[:9], "ends within its header"),
        (TRAIN_IMAGES, lambda content: b"", "ends within its header"),
        (TRAIN_IMAGES, replace_bytes(2, b"\x09"), "has the magic number 2307, not 2051"),
        (TRAIN_IMAGES, lambda content: idx(torch.zeros(0, 28, 28)), "holds 0 images"),
        (
            TRAIN_IMAGES,
            replace_bytes(8, struct.pack(">II", 14, 56)),
            "holds 12 images of 14x56 pixels",
        ),
        (TEST_LABELS, lambda content: content[:-1], "holds 4 bytes where .* tells of 5"),
        (TEST_LABELS, lambda content: idx(torch.zeros(4)), "holds 4 labels for 5 images"),
        (TEST_LABELS, replace_bytes(8, b"\x0a"), "holds the label 10"),
    ],
)
def test_a_broken_file_is_named(raw, name, damage, problem):
    path = raw / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"^{path} {problem}.*: delete it and run again"):
        load_mnist(raw)


def test_auto_does_not_pass_over_a_broken_file(raw):
    (raw / TRAIN_LABELS).write_bytes(b"")
    with pytest.raises(DataError, match=TRAIN_LABELS):
        load_dataset("auto", raw.parent.parent)


def test_an_archive_with_another_checksum_is_named(packed):
    path = packed / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"^{path} does not have MNIST's checksum: delete it"):
        load_mnist(packed)


def test_one_wrong_pixel_shows_against_the_archive(packed):
    path = packed / TRAIN_IMAGES
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=f"^{path} is not what {path.name}.gz holds: delete it"):
        load_mnist(packed)


def remove_unpacked(folder):
    for path in folder.iterdir():
        if path.suffix != ".gz":
            path.unlink()


def test_archives_are_unpacked_without_a_network(packed, offline):
    expected = load_mnist(packed).train.images
    remove_unpacked(packed)
    assert torch.equal(load_mnist(packed).train.images, expected)
    assert (packed / TRAIN_IMAGES).exists()


def test_archives_are_read_where_nothing_can_be_written(packed, offline, monkeypatch):
    expected = load_mnist(packed).train.images
    remove_unpacked(packed)
    before = sorted(packed.iterdir())
    access = os.access
    # A superuser may write anywhere, so that taking the permission away would not do.
    monkeypatch.setattr(os, "access", lambda path, mode: path != packed and access(path, mode))
    assert torch.equal(load_mnist(packed).train.images, expected)
    assert sorted(packed.iterdir()) == before


def test_a_missing_data_set_is_named_with_its_folder(tmp_path, offline):
    folder = tmp_path / "MNIST" / "raw"
    with pytest.raises(DataNotFoundError, match=rf"^MNIST is not in {folder} .*Connection refused"):
        load_dataset("mnist", tmp_path)


def test_auto_without_mnist_tells_in_one_line_that_it_takes_the_digits(tmp_path, offline):
    lines = []
    assert load_dataset("auto", tmp_path, notify=lines.append).name == "digits"
    (line,) = lines
    assert "put its four .gz files there" in line
    assert "training on the embedded 8x8 digits" in line
    assert "\n" not in line


def test_a_missing_data_set_is_downloaded(mirror, packed):
    assert len(load_mnist(packed).train) == 12
    assert {path.name for path in mirror.iterdir()} < {path.name for path in packed.iterdir()}


def test_a_failed_download_leaves_whole_files_only(mirror, packed):
    (mirror / f"{TRAIN_LABELS}.gz").write_bytes(b"half a file")
    with pytest.raises(DataNotFoundError, match=r"^MNIST is not in .*sent 11 bytes") as raised:
        load_mnist(packed)
    assert "\n" not in str(raised.value)
    (whole,) = packed.iterdir()
    assert whole.read_bytes() == (mirror / f"{TRAIN_IMAGES}.gz").read_bytes()


def test_only_what_is_missing_is_downloaded(mirror, packed):
    (mirror / f"{TRAIN_IMAGES}.gz").rename(packed / f"{TRAIN_IMAGES}.gz")
    assert len(load_mnist(packed).train) == 12


def test_the_mirror_that_had_a_file_is_asked_first_for_the_next(mirror, packed, monkeypatch):
    asked = []

    def fetch(mirrors, name, checksum):
        asked.append(list(mirrors))
        return mirrors[-1], (mirror / name).read_bytes()

    monkeypatch.setattr(MNIST, "mirrors", ["http://one/", "http://two/"])
    monkeypatch.setattr(download, "fetch", fetch)
    load_mnist(packed)
    one, two = "http://one/", "http://two/"
    assert asked == [[one, two], [two, one], [one, two], [two, one]]


def test_mirrors_are_asked_without_certificates_at_last(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["https://one/", "http://two/"])
    mirrors = download._mirrors(sources.SOURCES["mnist"])
    assert mirrors == ["https://one/", "http://two/", "http://one/"]


# What can't be read or written


@pytest.mark.parametrize("name", [TRAIN_LABELS, f"{TRAIN_LABELS}.gz"])
def test_a_directory_in_the_place_of_a_file_is_named(packed, name):
    (packed / name).unlink()
    (packed / name).mkdir()
    with pytest.raises(DataError, match=f"^{packed / name} can't be read: Is a directory$"):
        load_mnist(packed)


@pytest.mark.parametrize("name", ["MNIST", "MNIST/raw"])
def test_a_file_in_the_place_of_a_directory_is_named(mirror, packed, tmp_path, name):
    packed.rmdir()
    packed.parent.rmdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("in the way")
    path = packed / f"{TRAIN_IMAGES}.gz"
    with pytest.raises(DataNotFoundError, match=f"can't be fetched .{path} can't be written: "):
        load_mnist(packed)


def test_two_processes_may_write_a_file_at_once(tmp_path, monkeypatch):
    path, write_bytes = tmp_path / "file", Path.write_bytes

    def overtaken(self, content):
        write_bytes(self, content[:1])
        monkeypatch.undo()
        download._write(path, b"whole")  # by another one, which is faster
        assert path.read_bytes() == b"whole"
        write_bytes(self, content)

    monkeypatch.setattr(Path, "write_bytes", overtaken)
    download._write(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]
