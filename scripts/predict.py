"""Tell what is drawn in pictures: python scripts/predict.py runs/first photo.jpg."""

import sys

from torch_softmax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
