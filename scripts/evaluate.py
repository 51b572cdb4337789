"""Test a trained classifier: python scripts/evaluate.py runs/first."""

import sys

from torch_softmax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
