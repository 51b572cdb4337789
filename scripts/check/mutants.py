"""The mutants: each a function of the package with something in it gone wrong.

    python -m scripts.check.mutants "gradient: drop the − y" tests/losses/test_logits.py

runs tests with one of them in the place of the function.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch

from torch_softmax.losses import (
    _autograd,
    _capped,
    _chunked,
    _cross_entropy,
    _formulas,
    _small,
    _sweeps,
    _targets,
    distillation,
    log_prob,
)
from torch_softmax.losses._formulas import Numbers, Target, times
from torch_softmax.mnist import training
from torch_softmax.optim import _objective

Function = Any  # each has a signature of its own


class Mutant(NamedTuple):
    """A function by its name in a module or a class, and what makes another one of it."""

    name: str
    owner: Any
    function: str
    change: Callable[[Function], Function]

    @property
    def file(self) -> str:
        """The file of the package that the function is defined in."""
        _, *path = getattr(self.owner, self.function).__module__.split(".")
        return "/".join(path) + ".py"

    def take_its_place(self) -> None:
        """Put it in the place of the function, wherever the package knows that by a name."""
        original = getattr(self.owner, self.function)
        mutant = self.change(original)
        setattr(self.owner, self.function, mutant)
        for name, module in list(sys.modules.items()):
            if name.startswith("torch_softmax"):
                for known, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, known, mutant)


def mutants(owner: Any, *changes: tuple[str, str, Callable[[Function], Function]]) -> list[Mutant]:
    """The mutants of the functions of a module or a class."""
    return [Mutant(name, owner, function, change) for name, function, change in changes]


# What takes more than a line.


def positive_gap(below: Function) -> Function:
    """Take the label's logit for above the top."""

    def mutant(self: Target, top: Any, z: torch.Tensor) -> Any:
        return below(self, top, z) if self.is_dense() else -below(self, top, z)

    return mutant


def softmax_times_direction(hessian_product: Function) -> Function:
    """S ∘ u for S ∘ (u − S · u)."""

    def mutant(point: Any, change: Any, across: Any) -> Any:
        result = hessian_product(point, change, across)
        mean = (point.softmax * change.u).sum(1, keepdim=True)
        return result._replace(by_z=result.by_z + times(point.softmax * mean, point.factors.s))

    return mutant


def unmoved_target_in_gradient(hessian_product: Function) -> Function:
    """Forget that S − y changes where y does."""

    def mutant(point: Any, change: Any, across: Any) -> Any:
        result = hessian_product(point, change, across)
        if change.dp is None:
            return result
        dy = point.y.push_forward(change.dp.to(point.z.dtype))
        return result._replace(by_z=result.by_z + times(dy, point.factors.t))

    return mutant


def unmoved_target_in_slope(hessian_product: Function) -> Function:
    """Forget that the gap changes where y does."""

    def mutant(point: Any, change: Any, across: Any) -> Any:
        result = hessian_product(point, change, across)
        if change.dp is None:
            return result
        still = hessian_product(point, change._replace(dp=None), across)
        return result._replace(by_factors=still.by_factors)

    return mutant


def unweighted_slope_of_target(hessian_product: Function) -> Function:
    """Forget t in how ∂T/∂p changes."""

    def mutant(point: Any, change: Any, across: Any) -> Any:
        result = hessian_product(point, change, across)
        one = point._replace(factors=point.factors._replace(t=None))
        return result._replace(by_p=hessian_product(one, change, across).by_p)

    return mutant


def capped_and_then_scaled(z: Any, options: Any) -> Any:
    """The cap and the scale the other way round."""
    cap = options.softcap
    return (z if cap is None else torch.tanh(z / cap) * cap) * options.logit_scale


def negative_entropy(row_log_probs: Function) -> Function:
    """An entropy below 0."""

    def mutant(*given: Any) -> Any:
        log_prob, entropy, *others = row_log_probs(*given)
        return log_prob, -entropy, *others

    return mutant


def no_ragged_chunk(_: Function) -> Function:
    """Leave out a last chunk that is smaller than the others."""

    def mutant(rows: int, step: int) -> Iterator[slice]:
        for start in range(0, max(1, rows - (rows % step if rows > step else 0)), step):
            yield slice(start, min(start + step, rows))

    return mutant


def last_chunk_alone(add_product: Function) -> Function:
    """Forget the sum over the chunks before."""

    def mutant(total: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> None:
        add_product(total.zero_(), g, x)

    return mutant


@contextmanager
def saved_alone(ctx: Any) -> Iterator[Any]:
    """Leave forward mode as PyTorch leaves it to a jvp: switched off."""
    yield ctx.saved_tensors


def uphill(batch_update: Function) -> Function:
    """Go up where the loss rises."""

    def mutant(model: torch.nn.Linear, *args: Any, **options: Any) -> Any:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loss = batch_update(model, *args, **options)
        with torch.no_grad():
            for parameter, start in zip(model.parameters(), before, strict=True):
                parameter.copy_(2 * start - parameter)
        return loss

    return mutant


def decay_of_the_wrong_sign(batch_update: Function) -> Function:
    """Let the weights grow."""

    def mutant(
        model: Any, input: Any, target: Any, lr: float, weight_decay: float = 0.0, *rest: Any
    ) -> Any:
        before = model.weight.detach().clone()
        loss = batch_update(model, input, target, lr, weight_decay, *rest)
        with torch.no_grad():
            model.weight.add_(before, alpha=2 * lr * weight_decay)
        return loss

    return mutant


MUTANTS = [
    *mutants(
        _formulas,
        ("Jacobian: S_i δ_ij alone", "jacobian_product", lambda f: lambda S, u, dim: S * u),
        ("Jacobian: swap the δ", "jacobian_product", lambda f: lambda *args: -f(*args)),
        (
            "definition: no exponential",
            "row_numbers",
            lambda f: lambda z, y: f(z, y)._replace(log_sum=(z - z.amax(1, keepdim=True)).sum(1)),
        ),
        (
            "loss: forget log Σ e^z",
            "softmax_and_numbers",
            lambda f: (
                lambda *args: f(*args)._replace(
                    numbers=Numbers(0 * f(*args).numbers.log_sum, f(*args).numbers.gap)
                )
            ),
        ),
        ("gap: 0 · ∞", "product", lambda f: lambda factor, value: factor * value),
        (
            "gradient: drop the − y",
            "gradient_",
            lambda f: lambda S, y, factors: S.copy_(times(S, factors.s)),
        ),
        (
            "gradient: forget the factor s",
            "gradient_",
            lambda f: lambda S, y, factors: f(S, y, factors._replace(s=None)),
        ),
        (
            "gradient: forget the factor t",
            "gradient_",
            lambda f: lambda S, y, factors: f(S, y, factors._replace(t=None)),
        ),
        ("∂T/∂y: swap the sign", "target_gradient", lambda f: lambda *args: -f(*args)),
        (
            "∂T/∂p: forget the scale",
            "target_gradient",
            lambda f: lambda z, top, y, t: f(z, top, y._replace(scale=None), t),
        ),
        (
            "∂T/∂p: forget the factor t",
            "target_gradient",
            lambda f: lambda z, top, y, t: f(z, top, y, None),
        ),
        ("Hessian: S ∘ u alone", "hessian_product", softmax_times_direction),
        (
            "Hessian: forget the factor s",
            "hessian_product",
            lambda f: (
                lambda point, *rest: f(
                    point._replace(factors=point.factors._replace(s=None)), *rest
                )
            ),
        ),
        (
            "Hessian: forget a change of s",
            "hessian_product",
            lambda f: lambda point, change, across: f(point, change._replace(ds=None), across),
        ),
        (
            "Hessian: forget a change of t",
            "hessian_product",
            lambda f: lambda point, change, across: f(point, change._replace(dt=None), across),
        ),
        ("Hessian: forget how y moves S − y", "hessian_product", unmoved_target_in_gradient),
        ("slope: forget how y moves it", "hessian_product", unmoved_target_in_slope),
        ("slope by p: forget the factor t", "hessian_product", unweighted_slope_of_target),
    ),
    *mutants(
        Target,
        ("gap: of the label above the top", "below", positive_gap),
        (
            "gap: forget the floor",
            "below",
            lambda f: lambda self, *args: f(self._replace(floor=None), *args),
        ),
        (
            "gap: forget the label's share",
            "below",
            lambda f: lambda self, *args: f(self._replace(hot=None), *args),
        ),
        (
            "gradient: forget the label's share",
            "subtract_from_",
            lambda f: lambda self, *args: f(self._replace(hot=None), *args),
        ),
        (
            "gradient: forget the floor",
            "subtract_from_",
            lambda f: lambda self, *args: f(self._replace(floor=None), *args),
        ),
        ("slope by p: forget the scale", "push_forward", lambda f: lambda self, dp: dp),
    ),
    *mutants(
        _targets,
        (
            "weight: ignore it in y",
            "_of_labels",
            lambda f: lambda *args: f(*args)._replace(y=f(*args).y._replace(hot=None)),
        ),
        (
            "weight: ignore it in the mass",
            "_of_labels",
            lambda f: lambda *args: f(*args)._replace(mass=None),
        ),
        (
            "weight: ignore it in the mean",
            "_of_labels",
            lambda f: (
                lambda label, keep, *rest: f(label, keep, *rest)._replace(
                    divisor=len(label) if keep is None else keep.sum()
                )
            ),
        ),
        (
            "smoothing of labels: keep all of y",
            "_of_labels",
            lambda f: (
                lambda label, keep, weight, smoothing, *rest: f(
                    label, keep, weight, smoothing, *rest
                )._replace(
                    y=f(label, keep, weight, smoothing, *rest).y._replace(
                        hot=None if weight is None else weight[label]
                    )
                )
            ),
        ),
        (
            "smoothing: no floor in the mass",
            "_of_probabilities",
            lambda f: (
                lambda *args: f(*args)._replace(
                    mass=f(*args).mass - (0 if f(*args).y.floor is None else f(*args).y.floor.sum())
                )
            ),
        ),
        (
            "probabilities: no mass",
            "_of_probabilities",
            lambda f: lambda *args: f(*args)._replace(mass=None),
        ),
        (
            "ignore_index: count the ignored",
            "_of_labels",
            lambda f: (
                lambda label, keep, weight, *rest: f(label, keep, weight, *rest)._replace(
                    **({} if weight is not None else {"divisor": len(label)})
                )
            ),
        ),
        (
            "ignore_index: weigh the ignored",
            "_of_labels",
            lambda f: (
                lambda label, keep, weight, *rest: f(label, keep, weight, *rest)._replace(
                    **({} if weight is None else {"divisor": weight[label].sum()})
                )
            ),
        ),
    ),
    *mutants(
        _cross_entropy,
        (
            "forget the 1/B",
            "loss_of",
            lambda f: lambda inputs, terms, *rest: f(inputs, terms._replace(divisor=1), *rest),
        ),
        (
            "a mean of nothing is 0",
            "loss_of",
            lambda f: lambda inputs, terms, *rest: f(inputs, terms._replace(empty=None), *rest),
        ),
        (
            "keep the ignored",
            "loss_of",
            lambda f: (
                lambda inputs, terms, *rest: f(
                    inputs._replace(keep=None), terms._replace(keep=None), *rest
                )
            ),
        ),
        (
            "forget the mass",
            "loss_of",
            lambda f: lambda inputs, terms, *rest: f(inputs, terms._replace(mass=None), *rest),
        ),
        (
            "sum: forget the mass",
            "_factors",
            lambda f: lambda terms, how: f(terms._replace(mass=None), how),
        ),
        (
            "sum: keep the ignored",
            "_factors",
            lambda f: lambda terms, how: f(terms._replace(keep=None), how),
        ),
    ),
    *mutants(
        _small,
        (
            "small: forget the 1/B",
            "_total",
            lambda f: lambda count, dtype, reduction, *more: f(count, dtype, "sum", *more),
        ),
        ("small: skip the bias", "_logits", lambda f: lambda x, W, b: f(x, W, None)),
        (
            "small: forget the 1/B of second derivatives",
            "_factors",
            lambda f: lambda x, reduction: None,
        ),
    ),
    *mutants(
        _chunked,
        ("chunks: drop a ragged last one", "slices", no_ragged_chunk),
        (
            "total: forget the gradient from above",
            "scaled_",
            lambda f: lambda gradient, upstream: gradient,
        ),
        (
            "total: forget the factors",
            "sum_of_products",
            lambda f: lambda results, factors: f(results, (None,) * len(results)),
        ),
    ),
    *mutants(
        _sweeps,
        ("linear: ∂L/∂W of the last chunk alone", "add_pulled_to_classes_", last_chunk_alone),
        (
            "linear Hessian: skip a change of x",
            "_change",
            lambda f: lambda changes, here, u: f(changes, here, u._replace(x=None)),
        ),
        (
            "linear Hessian: skip a change of b",
            "_change",
            lambda f: lambda changes, here, u: f(changes, here, u._replace(b=None)),
        ),
        ("an ignored row that holds nan", "kept", lambda f: lambda inputs: inputs.x),
    ),
    *mutants(
        _sweeps.Logits,
        (
            "linear: skip the bias of few classes",
            "of",
            lambda f: (
                lambda self, x, W, b: f(
                    self, x, W, None if W is not None and len(W) <= _sweeps.FEW_CLASSES else b
                )
            ),
        ),
        (
            "linear: skip the bias of many classes",
            "of",
            lambda f: (
                lambda self, x, W, b: f(
                    self, x, W, None if W is not None and len(W) > _sweeps.FEW_CLASSES else b
                )
            ),
        ),
    ),
    *mutants(
        _autograd,
        ("forward mode: off where it nests", "nested_forward_mode", lambda f: saved_alone),
    ),
    *mutants(
        _capped,
        ("capped: cap before the scale", "changed", lambda f: capped_and_then_scaled),
        (
            "capped: forget the z-loss",
            "row_losses",
            lambda f: lambda options, *rest: f(options._replace(z_loss=0.0), *rest),
        ),
    ),
    *mutants(
        log_prob,
        ("log-prob: entropy of the wrong sign", "row_log_probs", negative_entropy),
    ),
    *mutants(
        distillation,
        ("distillation: KL the other way", "kl", lambda f: lambda log_p, log_q: f(log_q, log_p)),
        (
            "distillation: β for 1 − β",
            "log_mean",
            lambda f: lambda log_p, log_q, beta: f(log_p, log_q, 1 - beta),
        ),
    ),
    *mutants(
        _objective.Objective,
        (
            "objective: forget the penalty",
            "at",
            lambda f: lambda self, v: f(self, v)._replace(value=f(self, v).loss),
        ),
        (
            "objective: moments about 0",
            "moments",
            lambda f: lambda self: f(self)._replace(mean=torch.zeros(self.x.features)),
        ),
    ),
    *mutants(
        _objective.Hessian,
        (
            "objective: forget the penalty in H",
            "__call__",
            lambda f: lambda self, u: f(self, u) - self.objective.decay * u,
        ),
    ),
    *mutants(
        training,
        ("training: step uphill", "batch_update", uphill),
        (
            "training: forget the learning rate",
            "batch_update",
            lambda f: lambda model, x, y, lr, *rest, **more: f(model, x, y, 1.0, *rest, **more),
        ),
        ("training: decay the wrong way", "batch_update", decay_of_the_wrong_sign),
    ),
]


def main(argv: Sequence[str]) -> int:
    """Run tests with a mutant, and return pytest's exit status."""
    name, *arguments = argv
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    mutant.take_its_place()
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
