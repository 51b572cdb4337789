"""Tell what is drawn in pictures: python scripts/predict.py --checkpoint runs/first photo.jpg."""

import sys

from torch_softmax.mnist.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())
