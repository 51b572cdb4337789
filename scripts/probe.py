"""Fit linear probes for a path of penalties: python scripts/probe.py train.npz test.npz."""

import sys

try:
    from torch_softmax.estimator.probe import main
except ImportError as error:  # of scikit-learn, as the line says
    sys.exit(f"probe.py: {error}")

if __name__ == "__main__":
    sys.exit(main())
