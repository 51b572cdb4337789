"""The command verify: an audit of the package's own losses, a column for each."""

import argparse
import warnings
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ._command_line import choose_device
from .functional import (
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_log_prob,
    map_logits,
    softmax,
)
from .verify import OK, Report, Row, audit

N, D, K = 7, 3, 5
CHUNK = 3  # of the seven rows, so that the last chunk is a ragged one
SMOOTHING = 0.25
CAP, SCALE, Z_LOSS = 2.0, 0.5, 0.25
BETA, TEMPERATURE = 0.25, 2.0
COLUMNS = 5  # of a table


class Case(NamedTuple):
    """A loss, the same in plain operations, and the point to check it at."""

    loss: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: list[Tensor]


def normal(seed: int, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A function that draws normal numbers of a shape, alike on every device."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    return randn


def labels_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """A label for each row, and the same with the first one ignored."""
    labels = torch.arange(N, device=device) % K
    return labels, labels.index_fill(0, labels.new_tensor([0]), -100)


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """Each loss of labels, weighted and with one ignored, and of soft targets, smoothed.

    The small batch is of labels without an option, as it has a way of its own.
    """
    randn, (labels, ignoring) = normal(0, device, dtype), labels_on(device)
    x, W, b, z = randn(N, D), randn(K, D), randn(K), randn(N, K)
    soft = randn(N, K).detach().softmax(1).requires_grad_()
    weight = (1 + torch.arange(K, device=device) / 4).to(dtype)
    weighted = torch.nn.functional.one_hot(labels, K) * weight.double()
    weighted[0] = 0

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


def cases_of_heads(device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    """What else there is of a layer's logits, with every option that has a formula of its own."""
    randn, (labels, ignoring) = normal(1, device, dtype), labels_on(device)
    x, W, b, rows, of_classes = randn(N, D), randn(K, D), randn(K), randn(N), randn(K)
    teacher_x, teacher_W = randn(N, D + 1), randn(K, D + 1)
    keep = ignoring >= 0

    def picked(z: Tensor) -> Tensor:
        return z[torch.arange(N), labels]

    def capped(x: Tensor, W: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        z = CAP * (SCALE * (x @ W.t() + b) / CAP).tanh()
        loss = Z_LOSS * z.logsumexp(1).square() - picked(log_softmax(z))
        return (loss * rows)[keep].sum() / N

    def log_probs(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        z = x @ W.t() + b
        entropy = -(log_softmax(z) * log_softmax(z).exp()).sum(1)
        return torch.stack([picked(log_softmax(z)), entropy, z.logsumexp(1)]) * keep

    def distance(x: Tensor, W: Tensor, b: Tensor, teacher_x: Tensor, teacher_W: Tensor) -> Tensor:
        q = log_softmax((x @ W.t() + b) / TEMPERATURE).exp()
        p = log_softmax(teacher_x @ teacher_W.t() / TEMPERATURE).exp()
        m = BETA * p + (1 - BETA) * q
        kl = BETA * p * (p / m).log() + (1 - BETA) * q * (q / m).log()
        return TEMPERATURE**2 * kl.sum(1)[keep].mean()

    def focal(z: Tensor, label: Tensor, rows: Tensor, of_classes: Tensor) -> Tensor:
        log_S = log_softmax(z).gather(-1, label.unsqueeze(-1)).squeeze(-1)
        return rows * of_classes[label] * (1 - log_S.exp()) ** 2 * -log_S

    return {
        "capped": Case(
            lambda x, W, b, rows: linear_cross_entropy(
                *(x, W, ignoring),
                linear_bias=b,
                chunk_size=CHUNK,
                softcap=CAP,
                logit_scale=SCALE,
                z_loss=Z_LOSS,
                row_weight=rows,
                count=N,
            ),
            capped,
            [x, W, b, rows],
        ),
        "log-prob": Case(
            lambda x, W, b: torch.stack(
                linear_log_prob(x, W, ignoring, linear_bias=b, chunk_size=CHUNK)[:3]
            ),
            log_probs,
            [x, W, b],
        ),
        "distillation": Case(
            lambda x, W, b, teacher_x, teacher_W: linear_distillation(
                *(x, W, teacher_x, teacher_W),
                divergence="jsd",
                beta=BETA,
                temperature=TEMPERATURE,
                linear_bias=b,
                mask=keep,
                chunk_size=CHUNK,
            ),
            distance,
            [x, W, b, teacher_x, teacher_W],
        ),
        "map_logits": Case(
            lambda x, W, b, rows, of_classes: map_logits(
                *(focal, x, W, labels, rows),
                linear_bias=b,
                shared=(of_classes,),
                reduction="mean",
                chunk_size=CHUNK,
            ),
            lambda x, W, b, *others: focal(x @ W.t() + b, labels, *others).mean(),
            [x, W, b, rows, of_classes],
        ),
    }


def log_softmax(z: Tensor) -> Tensor:
    """The logarithm of softmax, in operations that autograd knows by heart."""
    return z - z.logsumexp(-1, keepdim=True)


def run(args: argparse.Namespace) -> int:
    """Check each loss and print the table; return 1 where a claim does not hold."""
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    every = {**cases(device, dtype), **cases_of_heads(device, dtype)}
    torch.set_num_threads(1)  # tensors as small as these take longer where threads share them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on what it falls back to or will deprecate
        reports = {
            name: audit(case.loss, case.inputs, case.reference, compiled=args.compiled)
            for name, case in every.items()
        }
    print(
        f"Worst relative error against float64 "
        f"({device.type}, {args.dtype}, torch {torch.__version__})\n"
    )
    left = iter(reports.items())
    while columns := dict(islice(left, COLUMNS)):
        print("\n".join(table(columns)) + "\n")
    failures = [
        (name, row) for name, report in reports.items() for row in report.rows if row.outcome != OK
    ]
    claims_made = sum(len(report.rows) for report in reports.values())
    print(f"{claims_made} claims, {len(failures)} failures")
    for name, row in failures:
        print(f"{name}: {row.name}: {text(row)} {row.detail}".rstrip())
    return 1 if failures else 0


def table(reports: dict[str, Report]) -> Iterable[str]:
    """The lines of some reports side by side."""
    yield line("", reports)
    for claims in zip(*(report.rows for report in reports.values()), strict=True):
        yield line(claims[0].name, map(text, claims))


def line(name: str, cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"{name:<28}{''.join(f'{cell:<16}' for cell in cells)}".rstrip()


def text(row: Row) -> str:
    """What a cell of a table shows of a claim."""
    if row.outcome == OK and row.error is not None:
        return f"{row.error:.1e}"
    return row.outcome
