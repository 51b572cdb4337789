"""Train softmax regression on MNIST, or a data set like it: python train_mnist.py --help."""

import sys

from torch_softmax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
