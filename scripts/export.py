"""Export a trained classifier: python scripts/export.py --checkpoint runs/first."""

import sys

from torch_softmax.mnist.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
