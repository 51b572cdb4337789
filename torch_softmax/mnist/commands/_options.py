"""The options that several of the commands have, with their defaults."""

import argparse
from pathlib import Path

from ..settings import DATASETS, DEFAULT_DATA_DIR


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add --dataset and --data-dir."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=DATASETS,
        default="auto",
        help="auto (the default) is mnist if it is on disk or can be downloaded, else digits, "
        "which are part of the package; idx is any other data set in MNIST's four files",
    )
    add_data_dir_option(data)


def add_data_dir_option(
    parser: argparse._ActionsContainer, default: Path | None = DEFAULT_DATA_DIR
) -> None:
    """Add --data-dir; without a default, it is for a run that knows where its data were."""
    usual = default or f"where the run had them, or {DEFAULT_DATA_DIR}"
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=default,
        metavar="DIR",
        help="where data sets are or are downloaded to, or the folder with the four files "
        f"(default: {usual})",
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add RUN_DIR, for `load_checkpoint` and `run_directory`."""
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="the directory of a training run, or the model.pt in it",
    )
