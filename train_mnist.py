"""Train softmax regression on MNIST, or a data set like it: python train_mnist.py --help."""

import sys

from torch_softmax.mnist.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
