"""Check every derivative of our losses, and of torch's own, against a naive oracle, as a table.

    python -m scripts.check.gradients
    python -m scripts.check.gradients --dtype float32 --seed 1 --json audit.json

A cell is the worst relative error to the oracle of tests/reference.py, which works in float64, a
row and a class at a time, and is differentiated by autograd or by hand. A cell is `raises` where an
implementation can't do it, and SILENTLY WRONG where the error is above √ε of the dtype. The exit
status is 0 only where nothing of ours has failed.
"""

import argparse
import functools
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests import reference
from torch_softmax import _checks as checks
from torch_softmax._command_line import Parser, add_device_option, choose_device, run_command
from torch_softmax._files import write_atomically
from torch_softmax._verify_losses import CHUNK, D, K, N, cases_of_heads, line, text
from torch_softmax.functional import cross_entropy, linear_cross_entropy
from torch_softmax.verify import (
    OK,
    RAISES,
    WRONG,
    Pair,
    Report,
    Row,
    Tensors,
    audit,
    judge,
    tolerance,
)

Loss = Callable[..., Tensor]  # of (x, W, b, target, **options)
DTYPES = ("float64", "float32", "bfloat16", "float16")


def on_logits(cross_entropy: Loss) -> Loss:
    """The loss of a linear layer by that of its logits."""
    return lambda x, W, b, target, **options: cross_entropy(F.linear(x, W, b), target, **options)


def fused(linear_cross_entropy: Loss, **fixed: Any) -> Loss:
    """The loss of a linear layer in one, with the bias in its place."""
    return lambda x, W, b, target, **options: linear_cross_entropy(
        x, W, target, linear_bias=b, **fixed, **options
    )


def torchs_fused(chunked: bool) -> Loss | None:
    """The fused loss of torch, None where this torch has none."""
    if not chunked:
        return fused(F.linear_cross_entropy) if hasattr(F, "linear_cross_entropy") else None
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    return fused(F.linear_cross_entropy, options=options)


Claim = Callable[[Loss, "Problem"], Pair]  # what a loss has, and what it should have
Cells = dict[str, Row]  # by implementation

OURS = {
    "ours on logits": on_logits(cross_entropy),
    "ours fused": fused(linear_cross_entropy, chunk_size=CHUNK),
}
IMPLEMENTATIONS: dict[str, Loss | None] = {
    **OURS,
    "torch on logits": on_logits(F.cross_entropy),
    "torch fused": torchs_fused(chunked=False),
    "torch chunked": torchs_fused(chunked=True),
}


@dataclass(frozen=True)
class Problem:
    """A linear layer, its target, and the options of its loss."""

    x: Tensor  # (N, D)
    W: Tensor  # (K, D)
    b: Tensor  # (K,)
    target: Tensor  # (N,) indices, or (N, K) probabilities
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def random(cls, seed: int, device: str, dtype: torch.dtype) -> "Problem":
        """Normal numbers, which every device draws alike."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (N, D), (K, D), (K,)
        x, W, b = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
        return cls(x, W, b, torch.randint(K, (N,), generator=generator).to(device))

    def leaves(self) -> Tensors:
        """What to differentiate by: x, W, b and the probabilities."""
        tensors = [self.x, self.W, self.b]
        if self.target.is_floating_point():
            tensors.append(self.target)
        return tuple(t.detach().clone().requires_grad_() for t in tensors)

    def loss(self, loss: Loss, *at: Tensor) -> Tensor:
        """A loss at some leaves."""
        x, W, b, *probabilities = at
        return loss(x, W, b, *(probabilities or [self.target]), **self.options)

    def results(self, loss: Loss) -> Tensors:
        """The value of a loss and its gradient by each leaf."""
        at = self.leaves()
        value = self.loss(loss, *at)
        upstream = torch.linspace(1, 0.5, value.numel()).reshape(value.shape).to(value)
        return exact(value.detach(), *torch.autograd.grad(value, at, upstream))

    def wide(self) -> "Problem":
        """The same for the oracle: real numbers in float64."""

        def wide(value: Any) -> Any:
            real = isinstance(value, Tensor) and value.is_floating_point()
            return value.double() if real else value

        options = {name: wide(value) for name, value in self.options.items()}
        return Problem(wide(self.x), wide(self.W), wide(self.b), wide(self.target), options)


def exact(*tensors: Tensor) -> Tensors:
    """The same numbers in float64 on a CPU, where they are compared."""
    return tuple(t.double().cpu() for t in tensors)


def oracle(x: Tensor, W: Tensor, b: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The loss of a linear layer, a row and a class at a time, on a CPU."""
    options = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in options.items()}
    result: Tensor = reference.linear_cross_entropy(
        x.cpu(), W.cpu(), target.cpu(), linear_bias=b.cpu(), **options
    )
    return result.to(x.device)


# The derivation, each equation by hand from S and y.


def softmax_and_target(problem: Problem) -> tuple[Tensor, Tensor]:
    """S and y of each row, both (N, K)."""
    x, W, b = exact(problem.x, problem.W, problem.b)
    S = torch.stack([reference.softmax(W @ x_n + b) for x_n in x])
    return S, torch.stack([reference.one_hot(label, K) for label in problem.target.cpu()])


def of_logits(problem: Problem, **options: Any) -> Problem:
    """The problem whose x are the logits, with the identity for W, so that ∂L/∂x is ∂L/∂z."""
    z = F.linear(problem.x, problem.W, problem.b)
    return replace(problem, x=z, W=torch.eye(K).to(z), b=0 * problem.b, options=options)


def loss_itself(loss: Loss, problem: Problem) -> Pair:
    """L = −Σ_k y_k log S_k."""
    S, y = softmax_and_target(problem)
    terms = torch.stack([-y[:, k] * S[:, k].log() for k in range(K)])
    rows = replace(problem, options={"reduction": "none"})
    return rows.results(loss)[:1], (terms.sum(0),)


def gradient_by_logits(loss: Loss, problem: Problem) -> Pair:
    """∂L/∂z = S − y."""
    problem = of_logits(problem, reduction="sum")
    S, y = softmax_and_target(problem)
    return problem.results(loss)[1:2], (S - y,)


def hessian_by_logits(loss: Loss, problem: Problem) -> Pair:
    """∂²L/∂z_i∂z_j = S_i (δ_ij − S_j), the Jacobian of the softmax."""
    problem = of_logits(problem, reduction="sum")
    z, *others = problem.leaves()
    (gradient,) = torch.autograd.grad(problem.loss(loss, z, *others), z, create_graph=True)
    by_row = gradient.sum(0)  # a row's gradient depends on no other row
    hessian = [torch.autograd.grad(by_row[k], z, retain_graph=True)[0] for k in range(K)]
    expected = torch.stack([reference.softmax_jacobian(z_n) for z_n in exact(problem.x)[0]])
    return exact(torch.stack(hessian, 1)), (expected,)


def gradient_by_input(loss: Loss, problem: Problem) -> Pair:
    """∂L/∂x = 1/B · Wᵀ(S − y)."""
    S, y = softmax_and_target(problem)
    (W,) = exact(problem.W)
    return problem.results(loss)[1:2], (torch.stack([W.t() @ (S[n] - y[n]) / N for n in range(N)]),)


def gradient_by_weight(loss: Loss, problem: Problem) -> Pair:
    """∂L/∂W = 1/B · Σ_n (S − y) xᵀ."""
    S, y = softmax_and_target(problem)
    (x,) = exact(problem.x)
    terms = [torch.outer(S[n] - y[n], x[n]) / N for n in range(N)]
    return problem.results(loss)[2:3], (torch.stack(terms).sum(0),)


def gradient_by_bias(loss: Loss, problem: Problem) -> Pair:
    """∂L/∂b = 1/B · Σ_n (S − y)."""
    S, y = softmax_and_target(problem)
    terms = [(S[n] - y[n]) / N for n in range(N)]
    return problem.results(loss)[3:4], (torch.stack(terms).sum(0),)


def gradient_by_target(loss: Loss, problem: Problem) -> Pair:
    """∂L/∂y = 1/B · (−log S)."""
    S, _ = softmax_and_target(problem)
    return probabilities(problem).results(loss)[4:5], (-S.log() / N,)


EQUATIONS = {
    "L = −Σ y log S": loss_itself,
    "∂L/∂z = S − y": gradient_by_logits,
    "∂²L/∂z² = S_i (δ_ij − S_j)": hessian_by_logits,
    "∂L/∂x = 1/B Wᵀ(S − y)": gradient_by_input,
    "∂L/∂W = 1/B Σ (S − y) xᵀ": gradient_by_weight,
    "∂L/∂b = 1/B Σ (S − y)": gradient_by_bias,
    "∂L/∂y = −1/B log S": gradient_by_target,
}

# The options and the number formats: value and gradients are those of the oracle.


def probabilities(problem: Problem) -> Problem:
    """The problem with probabilities for a target, which do not sum to 1."""
    target = torch.linspace(0, 0.5, N * K).reshape(N, K).to(problem.x)
    return replace(problem, target=target)


def with_options(**options: Any) -> Callable[[Problem], Problem]:
    """What sets the options of a problem."""
    return lambda problem: replace(problem, options=options)


def weighted(problem: Problem) -> Problem:
    """The problem with a weight for each class."""
    return replace(problem, options={"weight": torch.linspace(0.5, 2, K).to(problem.x)})


def ignoring(problem: Problem) -> Problem:
    """The problem with a few targets ignored."""
    target = problem.target.clone()
    target[::3] = -100
    return replace(problem, target=target)


def half(problem: Problem) -> Problem:
    """The problem in half precision."""
    x, W, b = (t.bfloat16() for t in (problem.x, problem.W, problem.b))
    return replace(problem, x=x, W=W, b=b)


VARIANTS = {
    "reduction sum": with_options(reduction="sum"),
    "reduction none": with_options(reduction="none"),
    "class weights": weighted,
    "label smoothing": with_options(label_smoothing=0.2),
    "probabilities": probabilities,
    "ignored targets": ignoring,
    "half precision (bfloat16)": half,
}


def as_the_oracle(loss: Loss, problem: Problem) -> Pair:
    """A loss and its gradients are those of the oracle."""
    return problem.results(loss), problem.wide().results(oracle)


# Where the oracle overflows, or has no answer, the answer is known.


def all_ignored(loss: Loss, problem: Problem) -> Pair:
    """The gradient of a mean over nothing is 0."""
    problem = replace(problem, target=torch.full_like(problem.target, -100))
    gradients = problem.results(loss)[1:]
    return gradients, tuple(map(torch.zeros_like, gradients))


def extreme_logits(loss: Loss, problem: Problem) -> Pair:
    """With logits this far apart S is one-hot: L = max z − z_label, ∂L/∂z = S − y."""
    order = torch.stack([torch.arange(K).roll(n) for n in range(N)])
    z = 4000 * order.double() - 8000
    far = replace(of_logits(problem), x=z.to(problem.x))
    residual = (F.one_hot(order.argmax(1), K) - F.one_hot(problem.target.cpu(), K)).double()
    return far.results(loss)[:2], ((residual * z).sum() / N, residual / N)


def masked_class(loss: Loss, problem: Problem) -> Pair:
    """A class with the logit −∞ is as if it were not there."""
    fewer = replace(problem, W=problem.W[1:], b=problem.b[1:], target=problem.target % (K - 1))
    hidden = replace(problem, b=problem.b.clone(), target=fewer.target + 1)
    hidden.b[0] = -torch.inf
    return hidden.results(loss)[:2], fewer.wide().results(oracle)[:2]


KNOWN = {
    "all targets ignored": all_ignored,
    "extreme logits (±8000)": extreme_logits,
    "a class masked by −∞": masked_class,
}

# The ways to differentiate.

AUDITED = (  # claims of torch_softmax.verify
    "inputs unchanged",
    "second backward",
    "forward mode",
    "double backward",
    "forward over reverse",
    "under no_grad",
    "forward over backward",
    "vmap of grad",
    "compiled twice backward",
    "compiled hvp (eager)",
    "compiled hvp (aot_eager)",
)
CHECKERS: dict[str, Callable[..., bool]] = {"gradcheck": gradcheck, "gradgradcheck": gradgradcheck}


def compiled(loss: Loss, problem: Problem) -> Pair:
    """Compiled as one graph, the loss and its gradients are the same."""
    torch.compiler.reset()
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    return as_the_oracle(whole, problem)


def checked(name: str, loss: Loss, problem: Problem) -> Row:
    """What a checker of torch's finds by finite differences, always in float64."""
    problem = problem.wide()
    try:
        right = CHECKERS[name](
            lambda *at: problem.loss(loss, *at), problem.leaves(), raise_exception=False
        )
    except Exception as raised:  # that an implementation can't do this is a finding
        return Row(name, RAISES, None, f"{type(raised).__name__}: {raised}")
    return Row(name, OK if right else WRONG)


# The table.


def cases(problem: Problem) -> Iterator[tuple[str, Claim, Problem]]:
    """Every claim that is a pair of results, with its name and the problem to see it on."""
    for name, claim in EQUATIONS.items():
        yield name, claim, problem
    for name, variant in VARIANTS.items():
        yield name, as_the_oracle, variant(problem)
    for name, claim in KNOWN.items():
        yield name, claim, problem
    yield "compiled as one graph", compiled, problem


def table(problem: Problem) -> Iterator[tuple[str, Cells]]:
    """The rows of the table, as they are worked out."""
    losses = {name: loss for name, loss in IMPLEMENTATIONS.items() if loss is not None}

    def judged(name: str, claim: Claim, problem: Problem) -> Cells:
        allowed = tolerance(problem.x.dtype)
        return {
            column: judge(name, functools.partial(claim, loss, problem), allowed)
            for column, loss in losses.items()
        }

    for name, claim, at in cases(problem):
        yield name, judged(name, claim, at)
    for name in CHECKERS:
        yield name, {column: checked(name, loss, problem) for column, loss in losses.items()}
    reports = {
        column: audit(
            functools.partial(problem.loss, loss),
            problem.leaves(),
            functools.partial(problem.loss, oracle),
            compiled=True,
        )
        for column, loss in losses.items()
    }
    for name in AUDITED:
        yield name, {column: report[name] for column, report in reports.items()}
    for name, report in reports_of_heads(problem):
        yield name, {"ours fused": worst(report)}


def reports_of_heads(problem: Problem) -> Iterator[tuple[str, Report]]:
    """An audit of each of our functions of a layer's logits of which torch has none."""
    for name, case in cases_of_heads(problem.x.device, problem.x.dtype).items():
        yield f"{name}, audited", audit(case.loss, case.inputs, case.reference, compiled=True)


def worst(report: Report) -> Row:
    """The first claim that does not hold, or the one with the largest error."""
    failed = [row for row in report.rows if row.outcome != OK]
    return failed[0] if failed else max(report.rows, key=lambda row: row.error or 0)


def as_json(conditions: dict[str, object], rows: dict[str, Cells]) -> str:
    """The table as JSON, with null for an error that is no finite number."""

    def entry(cell: Row) -> dict[str, object]:
        error = cell.error if cell.error is not None and math.isfinite(cell.error) else None
        return {"outcome": cell.outcome, "error": error, "detail": cell.detail}

    claims = {name: {c: entry(cell) for c, cell in cells.items()} for name, cells in rows.items()}
    return json.dumps({**conditions, "claims": claims}, indent=1, ensure_ascii=False)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        prog="check.gradients",
        description="Check every derivative of our losses and of torch's against a naive oracle.",
        epilog="exit status: 0 where nothing of ours has failed, 1 where something has",
    )
    add_device_option(parser, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--seed", type=int, default=0, help="of the problem (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args(argv)
    return run_command(parser, lambda: check(arguments))


def check(arguments: argparse.Namespace) -> int:
    """Check, print and write; return 1 where something of ours has failed."""
    checks.seed("--seed", arguments.seed)
    if arguments.json and not arguments.json.parent.is_dir():
        raise ValueError(f"--json must be in a directory that is there, got {arguments.json}")
    device = choose_device(arguments.device).type
    torch.set_num_threads(1)  # tensors as small as these take longer where threads share them
    problem = Problem.random(arguments.seed, device, getattr(torch, arguments.dtype))
    conditions = {
        "device": device,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "torch": torch.__version__,
    }
    title = ", ".join(f"{name} {value}" for name, value in conditions.items())
    print(f"Worst relative error against the float64 oracle ({title})\n")
    print(line("", IMPLEMENTATIONS))
    rows = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on what it falls back to or will deprecate
        for name, cells in table(problem):
            rows[name] = cells
            shown = (text(cells[column]) if column in cells else "-" for column in IMPLEMENTATIONS)
            print(line(name, shown), flush=True)
    failures = [
        (name, column, cell)
        for name, cells in rows.items()
        for column, cell in cells.items()
        if column in OURS and cell.outcome != OK
    ]
    print(f"\nours: {len(rows)} claims, {len(failures)} failures")
    for name, column, cell in failures:
        print(f"{column}: {name}: {text(cell)} {cell.detail}")
    if arguments.json:
        write_atomically(arguments.json, (as_json(conditions, rows) + "\n").encode())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
