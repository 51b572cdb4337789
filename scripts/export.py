"""Export a trained classifier: python scripts/export.py runs/first."""

import sys

from torch_softmax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
