"""Fit linear probes for a path of penalties: python scripts/probe.py train.npz test.npz."""

import sys

from torch_softmax.estimator.probe import main

if __name__ == "__main__":
    sys.exit(main())
