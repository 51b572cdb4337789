"""The command verify: an audit of the package's own losses, a column for each."""

import argparse
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ._command_line import choose_device
from .functional import cross_entropy, linear_cross_entropy, softmax
from .verify import OK, Row, audit

N, D, K = 7, 3, 5
CHUNK = 3  # of the seven rows, so that the last chunk is a ragged one
SMOOTHING = 0.25


class Case(NamedTuple):
    """A loss, the same in plain operations, and the point to check it at."""

    loss: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: list[Tensor]


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """Each loss of labels, weighted and with one ignored, and of soft targets, smoothed.

    The small batch is of labels without an option, as it has a way of its own.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator)  # alike on every device
        return numbers.to(device, dtype).requires_grad_()

    x, W, b, z = randn(N, D), randn(K, D), randn(K), randn(N, K)
    soft = randn(N, K).detach().softmax(1).requires_grad_()
    labels = torch.arange(N, device=device) % K
    weight = (1 + torch.arange(K, device=device) / 4).to(dtype)
    weighted = torch.nn.functional.one_hot(labels, K) * weight.double()
    weighted[0] = 0
    ignoring = labels.index_fill(0, labels.new_tensor([0]), -100)

    def of_labels(z: Tensor) -> Tensor:
        return -(weighted * log_softmax(z)).sum() / weighted.sum()

    def of_plain_labels(z: Tensor) -> Tensor:
        return -log_softmax(z)[torch.arange(N), labels].sum() / N

    def of_soft(z: Tensor, soft: Tensor) -> Tensor:
        smoothed = (1 - SMOOTHING) * soft + SMOOTHING / K
        return -(smoothed * log_softmax(z)).sum() / N

    return {
        "softmax": Case(softmax, lambda z: log_softmax(z).exp(), [z]),
        "logits, labels": Case(lambda z: cross_entropy(z, ignoring, weight), of_labels, [z]),
        "logits, soft": Case(
            lambda z, y: cross_entropy(z, y, label_smoothing=SMOOTHING), of_soft, [z, soft]
        ),
        "layer, labels": Case(
            lambda x, W, b: linear_cross_entropy(
                x, W, ignoring, linear_bias=b, weight=weight, chunk_size=CHUNK
            ),
            lambda x, W, b: of_labels(x @ W.t() + b),
            [x, W, b],
        ),
        "layer, soft": Case(
            lambda x, W, b, y: linear_cross_entropy(
                x, W, y, linear_bias=b, label_smoothing=SMOOTHING, chunk_size=CHUNK
            ),
            lambda x, W, b, y: of_soft(x @ W.t() + b, y),
            [x, W, b, soft],
        ),
        "small batch": Case(
            lambda x, W, b: linear_cross_entropy(x, W, labels, linear_bias=b),
            lambda x, W, b: of_plain_labels(x @ W.t() + b),
            [x, W, b],
        ),
    }


def log_softmax(z: Tensor) -> Tensor:
    """The logarithm of softmax, in operations that autograd knows by heart."""
    return z - z.logsumexp(1, keepdim=True)


def run(args: argparse.Namespace) -> int:
    """Check each loss and print the table; return 1 where a claim does not hold."""
    device = choose_device(args.device)
    torch.set_num_threads(1)  # tensors as small as these take longer where threads share them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on what it falls back to or will deprecate
        reports = {
            name: audit(case.loss, case.inputs, case.reference, compiled=args.compiled)
            for name, case in cases(device, getattr(torch, args.dtype)).items()
        }
    print(
        f"Worst relative error against float64 "
        f"({device.type}, {args.dtype}, torch {torch.__version__})\n"
    )
    print(line("", reports))
    for claims in zip(*(report.rows for report in reports.values()), strict=True):
        print(line(claims[0].name, map(text, claims)))
    failures = [
        (name, row) for name, report in reports.items() for row in report.rows if row.outcome != OK
    ]
    claims_made = sum(len(report.rows) for report in reports.values())
    print(f"\n{claims_made} claims, {len(failures)} failures")
    for name, row in failures:
        print(f"{name}: {row.name}: {text(row)} {row.detail}".rstrip())
    return 1 if failures else 0


def line(name: str, cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"{name:<28}{''.join(f'{cell:<16}' for cell in cells)}".rstrip()


def text(row: Row) -> str:
    """What a cell of a table shows of a claim."""
    if row.outcome == OK and row.error is not None:
        return f"{row.error:.1e}"
    return row.outcome
