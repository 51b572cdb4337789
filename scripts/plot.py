"""Draw a report of a training run: python scripts/plot.py runs/first."""

import sys

from torch_softmax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
