"""A small MNIST, as files."""

import struct

import torch


def idx(values):
    """A tensor of bytes in the IDX format."""
    header = struct.pack(f">{1 + values.dim()}I", 0x800 + values.dim(), *values.shape)
    return header + bytes(values.flatten().int().tolist())


def write_mnist(folder, train_size=12, test_size=5):
    """Write the four unpacked files with random content, and return the training images."""
    folder.mkdir(parents=True)
    for part, size in (("train", train_size), ("t10k", test_size)):
        images = torch.randint(256, (size, 28, 28), dtype=torch.uint8)
        labels = torch.arange(size, dtype=torch.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        if part == "train":
            train_images = images
    return train_images
