"""Test a trained classifier: python scripts/evaluate.py --checkpoint runs/first."""

import sys

from torch_softmax.mnist.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
