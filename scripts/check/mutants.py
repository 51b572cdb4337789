"""The mutants: functions and lines of the package with something in them gone wrong.

    python -m scripts.check.mutants "gradient: drop the − y" tests/losses/test_logits.py

runs tests with a mutant in the place of its function, whatever stands in the body. Where a line
within a function is meant, a text is replaced in a copy of the package.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, reduce
from importlib import import_module
from math import log, nan
from operator import invert, mul, neg
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

Function = Any  # each has a signature of its own
Change = Callable[[Function], Function]


class Mutant(NamedTuple):
    """A function by its name in a file of the package, and what makes another one of it."""

    name: str
    file: str
    function: str
    change: Change

    def place(self) -> tuple[Any, str]:
        """The module or class that has the function, and the function's name there."""
        module = import_module(f"torch_softmax/{self.file}".removesuffix(".py").replace("/", "."))
        *classes, name = self.function.split(".")
        return reduce(getattr, classes, module), name

    def take_its_place(self) -> None:
        """Put it in the place of the function, wherever the package knows that by a name."""
        owner, name = self.place()
        original = vars(owner)[name]
        if isinstance(original, cached_property):
            setattr(owner, name, property(self.change(original.func)))
            return
        mutant = self.change(original)
        setattr(owner, name, mutant)
        for imported, module in list(sys.modules.items()):
            if imported.startswith("torch_softmax"):
                for known, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, known, mutant)


class Text(NamedTuple):
    """A text that occurs once in a file of the package, and what to put in its place."""

    name: str
    file: str
    old: str
    new: str

    def apply(self, package: Path) -> None:
        """Change a copy of the package.

        Raises:
            ValueError: The old text does not occur exactly once.
        """
        path = package / self.file
        source = path.read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(
                f"mutation {self.name!r} must find its text once in {self.file}, "
                f"found it {source.count(self.old)} times: {self.old!r}"
            )
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


# Ways to change a function. Any value becomes another one, or what a function makes of it, and a
# name such as along__numbers__gap is a field within a field; in a tuple, a field of each element.


def _put(value: Any, path: Sequence[str], by: Any) -> Any:
    if not path:
        return by(value) if callable(by) else by
    if type(value) is tuple:
        return tuple(_put(element, path, by) for element in value)
    name, *deeper = path
    new = _put(getattr(value, name), deeper, by)
    if isinstance(value, tuple):
        return value._replace(**{name: new})  # type: ignore[attr-defined]
    other = copy.copy(value)
    object.__setattr__(other, name, new)
    return other


def given(**changes: Any) -> Change:
    """Give the function other arguments."""

    def change(function: Function) -> Function:
        signature = inspect.signature(function)

        def mutant(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for place, by in changes.items():
                name, *path = place.split("__")
                bound.arguments[name] = _put(bound.arguments[name], path, by)
            return function(*bound.args, **bound.kwargs)

        return mutant

    return change


def returning(by: Any, *path: str) -> Change:
    """Return something else, or a result with another field."""
    return lambda function: lambda *args, **kwargs: _put(function(*args, **kwargs), path, by)


def as_given(field: str, **changes: Any) -> Change:
    """Return a field as it is for other arguments, and the others as they are."""

    def change(function: Function) -> Function:
        other = given(**changes)(function)

        def mutant(*args: Any, **kwargs: Any) -> Any:
            new = getattr(other(*args, **kwargs), field)
            return function(*args, **kwargs)._replace(**{field: new})

        return mutant

    return change


def zero(value: Any) -> Any:
    """0 for each number."""
    return None if value is None else value * 0


def nothing(*_: Any) -> None:
    """Do nothing."""


def in_front(index: Any) -> Any:
    """The first rows, as many as count."""
    return None if index is None else torch.arange(len(index))


def half(value: Any) -> Any:
    """Half of each number."""
    return value / 2


def sum_for_mean(reduction: str) -> str:
    """'sum' for 'mean'."""
    return "sum" if reduction == "mean" else reduction


def without_mean(second_order: Function) -> Function:
    """S ∘ u for S ∘ (u − S · u)."""

    def mutant(row: Any, factors: Any, along: Any, asked: Any) -> Any:
        change = second_order(row, factors, along, asked)
        S, s = row.softmax.unsqueeze(1), torch.as_tensor(factors.log_sum).view(-1, 1, 1)
        return change._replace(z=change.z + s * S * (S * along.z).sum(2, keepdim=True))

    return mutant


# Of each file: the name of a mutant, a function and its change, or a text and what takes its place.
CHANGES: dict[str, list[tuple[str, str, Change | str]]] = {
    "functional.py": [
        ("softmax: forget the dtype", "softmax", given(dtype=None)),
        ("linear: forget the chunk size", "linear_cross_entropy", given(chunk_size=None)),
        ("log-prob: entropy of the wrong sign", "linear_log_prob", returning(neg, "entropy")),
        ("log-prob: correct for wrong", "linear_log_prob", returning(invert, "correct")),
        ("log-prob: forget the cap", "linear_log_prob", given(softcap=None)),
        ("log-prob: forget the scale", "linear_log_prob", given(logit_scale=1.0)),
        ("log-prob: forget the dtype", "linear_log_prob", given(dtype=None)),
        ("log-prob: forget the ignored index", "linear_log_prob", given(ignore_index=-100)),
        ("log-prob: entropy that nobody asked for", "linear_log_prob", given(entropy=True)),
        ("distillation: forget the mask", "linear_distillation", given(mask=None)),
        ("distillation: forget the dtype", "linear_distillation", given(dtype=None)),
        ("distillation: no mean", "linear_distillation", given(reduction=sum_for_mean)),
        ("map: forget the mask", "map_logits", given(mask=None)),
        ("map: forget the chunk size", "map_logits", given(chunk_size=None)),
        ("map: no mean", "map_logits", given(reduction=sum_for_mean)),
    ],
    "losses/_formulas.py": [
        ("Jacobian: S_i δ_ij alone", "jacobian_product", lambda f: lambda S, u, dim: S * u),
        ("Jacobian: swap the δ", "jacobian_product", returning(neg)),
        ("definition: forget the logarithm", "row_numbers", returning(torch.exp, "log_sum")),
        ("definition: no mean gap", "row_numbers", returning(zero, "mean_gap")),
        ("loss: forget log Σ e^z", "Row.log_sum", returning(zero)),
        ("logsumexp: forget the top", "Row.top", returning(zero)),
        ("gap: 0 · ∞", "product", lambda f: mul),
        ("gap: above the top", "Target.below", returning(neg)),
        ("gap: forget the floor", "Target.below", given(self__floor=None)),
        ("gap: forget the label's share", "Target.below", given(self__hot=None)),
        ("correct: each of equal logits", "is_top", lambda f: lambda z, y, gap: (gap == 0).to(z)),
        ("correct: a row of nan", "is_top", given(gap=torch.zeros_like)),
        ("gradient: drop the − y", "Row.gradient", given(factors__gap=0.0)),
        ("gradient: forget the factor s", "Row.gradient", given(factors__log_sum=1.0)),
        ("gradient: forget the factor t", "Row.gradient", given(factors__gap=1.0)),
        ("gradient: forget the label's share", "Target.subtract_from_", given(self__hot=None)),
        ("gradient: forget the floor", "Target.subtract_from_", given(self__floor=None)),
        ("entropy: half of its gradient", "Row.gradient", given(factors__mean_gap=half)),
        ("entropy: forget mean_gap + 1", "Row.slopes", given(factors__mean_gap=0.0)),
        ("z-loss: half of its gradient", "Row.slopes", given(factors__square=half)),
        ("∂T/∂y: swap the sign", "Row.target_gradient", returning(neg)),
        ("∂T/∂p: forget the factor t", "Row.target_gradient", given(t=1.0)),
        ("∂T/∂p: forget the scale", "Row.target_gradient", given(self__y__scale=None)),
        ("slope by p: forget the scale", "Target.scaled", lambda f: lambda self, dp: dp),
        ("slope by p: forget the factor t", "second_order", as_given("p", factors__gap=1.0)),
        ("slope: forget how y moves it", "second_order", as_given("numbers", along__p=None)),
        ("slope: half for the z-loss", "second_order", returning(half, "numbers", "square")),
        ("slope: half for the entropy", "second_order", returning(half, "numbers", "mean_gap")),
        ("Hessian: S ∘ u alone", "second_order", without_mean),
        ("Hessian: forget how y moves S − y", "second_order", as_given("z", along__p=None)),
        ("Hessian: forget the factor s", "second_order", given(factors__log_sum=1.0)),
        ("Hessian: forget the factor h", "second_order", given(factors__mean_gap=0.0)),
        ("Hessian: forget the factor r", "second_order", given(factors__square=0.0)),
        ("Hessian: forget a change of s", "second_order", given(along__numbers__log_sum=0.0)),
        ("Hessian: forget a change of t", "second_order", given(along__numbers__gap=0.0)),
        ("Hessian: forget a change of h", "second_order", given(along__numbers__mean_gap=0.0)),
        ("Hessian: forget a change of r", "second_order", given(along__numbers__square=0.0)),
    ],
    "losses/_numbers.py": [
        (
            "capped: cap before the scale",
            "changed",
            lambda f: lambda z, cap, scale, **more: f(z, abs(cap * scale), scale, **more),
        ),
        ("capped: forget its slope", "Changed.times_slope", given(self__tanh=None)),
        ("scaled: forget its slope", "Changed.times_slope", given(self__scale=1.0)),
        ("capped: forget how its slope bends", "Changed.bend", returning(zero)),
        ("capped: forget the scale in the bend", "Changed.bend", given(self__scale=1.0)),
        ("capped: forget the cap in the bend", "Changed.bend", given(self__cap=1.0)),
    ],
    "losses/_targets.py": [
        ("weight: ignore it in y", "fold", returning(None, "y", "hot")),
        (
            "weight: ignore it in the mass",
            "fold",
            returning(lambda terms: terms if terms.y.is_dense() else terms._replace(mass=None)),
        ),
        (
            "weight: ignore it in the mean",
            "if hot is not None:\n        divisor",
            "if 0:\n        _",
        ),
        ("smoothing of labels: keep all of y", "else hot) * (1 - smoothing)", "else hot)"),
        ("smoothing: no floor in the mass", "mass = mass + floor.sum()", "pass"),
        (
            "probabilities: no mass",
            "fold",
            returning(lambda terms: terms._replace(mass=None) if terms.y.is_dense() else terms),
        ),
        ("ignore_index: count the ignored", "keep.sum(dtype=dtype)", "len(label)"),
        ("ignore_index: weigh the ignored", "hot if keep is None else hot * keep", "hot"),
        ("row_weight: none", "Terms.with_rows", given(rows__weight=None)),
        ("row_weight: a gradient that is left out", "if not is_moving(factor):", "if True:"),
        ("row_weight: rows of 0 are read", "if not is_moving(factor):", "if False:"),
        ("count: none", "Terms.with_rows", given(rows__divisor=None)),
        ("count: a mean over 0 is nan", "Terms.with_rows", returning(nan, "mean_of_no_rows")),
        ("left out: counted in a mean", "Counted.number", lambda f: lambda self, count: count),
        ("left out: nan where a mask is", "Counted.read_zeros", lambda f: lambda self, rows: rows),
        (
            "left out: fn at rows of 0",
            "Counted.read_others",
            lambda f: lambda s, t: s.read_zeros(t),
        ),
        ("left out: losses before the rest", "Counted.restore", given(self__index=in_front)),
        ("left out: multiplied all the same", "has_numbers", returning(False)),
    ],
    "losses/logits.py": [
        ("forget the 1/B", "loss_of", given(terms__divisor=1)),
        ("a mean of nothing is 0", "loss_of", given(terms__mean_of_no_rows=0.0)),
        ("keep the ignored", "loss_of", given(terms__keep=None)),
        ("forget the mass", "loss_of", given(terms__mass=None)),
        ("forget the row weights", "loss_of", given(terms__factor=None)),
        ("forget the z-loss", "loss_of", given(options__z_loss=0.0)),
    ],
    "losses/distillation.py": [
        ("KL: the other way", "kl", lambda f: lambda log_p, log_q: f(log_q, log_p)),
        ("KL: 0 · ∞", "kl", lambda f: lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(1)),
        ("JSD: β for 1 − β", "log_mean", given(beta=lambda beta: 1 - beta)),
        (
            "JSD: nan where both are −∞",
            "log_mean",
            lambda f: lambda p, q, beta: torch.logaddexp(p + log(beta), q + log(1 - beta)),
        ),
        ("JSD: nan where one is −∞", ".masked_fill(log == -torch.inf, 0)", ""),
        ("distillation: T for T²", "values = (self.temperature**2", "values = (self.temperature"),
        ("distillation: T for T² in the definition", "**2 * value", " * value"),
        (
            "distillation: the sides swapped",
            "Divergence.first",
            given(at__logits=lambda z: z[::-1]),
        ),
        ("distillation gradient: T = 1", "self.temperature * g * per_row", "g * per_row"),
        ("distillation: forget the factor", "Divergence.first", given(at__results=(1.0,))),
    ],
    "losses/mapped.py": [
        ("map: what is captured is no error", "MappedRows.refuse", lambda f: nothing),
        ("map: rows may draw noise", 'randomness="error"', 'randomness="different"'),
        ("map: fn may write to its rows", "if versions != ", "if False and versions != "),
    ],
    "losses/_small.py": [
        ("small: forget the 1/B", "small_loss", given(reduction=sum_for_mean)),
        ("small: skip the bias", "small_loss", given(batch=lambda b: (*b[:2], None, b[3]))),
        (
            "small: forget smoothing, scale and z-loss",
            "small_loss",
            given(numbers=(-100, 0.0, 1.0, 0.0)),
        ),
        ("small: forget the other options", "small_loss", given(left_out=())),
        ("small: forget the gradient from above", " or upstream.item() != 1", ""),
        ("small: forget the 1/B of second derivatives", "1 / x.shape[0])", "1.0)"),
    ],
    "losses/_chunked.py": [
        (
            "chunks: drop a ragged last one",
            "slices",
            lambda f: lambda rows, step: f(rows - rows % step if rows > step else rows, step),
        ),
        ("chunks: sums of the last one alone", "total += part", "total.copy_(part)"),
        ("left out: the first rows are read", "read", given(index=in_front)),
        ("left out: results before the rest", "restored", given(index=in_front)),
        ("total: forget the gradient from above", "scaled_", lambda f: lambda g, scale: g),
        ("total: forget the factors", "sum_of_products", given(factors=lambda f: (None,) * len(f))),
        (
            "total: hand out what was taken twice",
            "taken, ctx.taken = ctx.taken, None",
            "taken = ctx.taken",
        ),
    ],
    "losses/_products.py": [
        ("linear: skip the bias of many classes", "multiply", given(b=None)),
        (
            "linear: ∂L/∂W of the last chunk alone",
            "add_pulled_to_classes_",
            given(total=torch.zero_),
        ),
        ("linear Hessian: no uW g", "add_pulled_to_rows_", lambda f: nothing),
        ("linear Hessian: no ux Wᵀ", "add_multiplied_", lambda f: lambda out, x, W: out),
    ],
    "losses/_sweeps.py": [
        (
            "linear Hessian: skip a change of x",
            "for u in along))",
            "for u in along))._replace(x=None)",
        ),
        (
            "linear Hessian: skip a change of W",
            "for u in along))",
            "for u in along))._replace(W=None)",
        ),
        (
            "linear Hessian: skip a change of b",
            "for u in along))",
            "for u in along))._replace(b=None)",
        ),
        (
            "linear Hessian: no g uxᵀ",
            "add_pulled_to_classes_(out.W, g, self.ux)",
            "pass",
        ),
        ("many directions: what the first one does, for each", "u[group]", "u[: len(u[group])]"),
        ("linear: ∂L/∂b of the last block alone", "b.add_(gradient", "b.copy_(gradient"),
        ("linear: ∂L/∂z of one block alone", "to[block] = gradient", "pass"),
        (
            "linear: ∂L/∂x over the first chunk's",
            "g, self.layer.W, out.x[self.rows]",
            "g, self.layer.W, out.x[: len(g)]",
        ),
        (
            "linear: skip the bias of few classes",
            "t() if b is None else torch",
            "t() if True else torch",
        ),
        ("map: a shared gradient of the last block alone", "total.add_(", "total.copy_("),
    ],
    "losses/_autograd.py": [
        ("forward mode: off where it nests", "nested_forward_mode", lambda f: nullcontext),
        ("inference mode: its tensors are saved", "savable", lambda f: lambda tensor: tensor),
        (
            "inference mode: nothing is recorded",
            "inference_mode(False), torch.enable_grad",
            "enable_grad",
        ),
        ("map: nothing is captured", "captured_leaves", returning([])),
        ("gradients are always taken along", "may_take_gradients", returning(True)),
    ],
    "losses/_operators.py": [
        ("sum: forget the mass", "sum_of", given(factors=lambda f: (None, *f[1:]))),
        ("sum: forget the row weights", "sum_of", given(factors=lambda f: (f[0], None, *f[2:]))),
        ("sum: keep the ignored", "sum_of", given(counted__index=None)),
        ("compiled: forget the gradient from above", "g * upstream if w", "g if w"),
        ("compiled: gradients without a graph", "torch.is_grad_enabled() or more", "more"),
    ],
    "losses/_dtypes.py": [("half precision is summed in half", "sum_dtype", returning(None))],
    "_transforms.py": [
        ("inference mode: func gives 0", "refuse_inference_mode", lambda f: nothing)
    ],
    "causal_lm.py": [("causal LM: a scale that is rounded", "scale = 1.0", "pass")],
    "optim/_objective.py": [
        ("objective: forget the penalty", "Objective.penalty", returning(0.0)),
        ("objective: moments about 0", "Objective.moments", returning(zero, "mean")),
        (
            "objective: forget the penalty in H",
            "Hessian.__call__",
            lambda f: lambda self, u: f(self, u) - self.objective.decay * u,
        ),
        ("newton: trials of half the length", "Line.value", given(length=half)),
    ],
    "optim/_hessian.py": [
        ("hessian: forget what rows count", "Chunk.weighted", lambda f: lambda chunk, v, block: v),
    ],
    "curvature/_sweeps.py": [
        ("curvature: a diagonal of x, not x²", "a, cast(chunk.x, S.dtype).square()", "a, chunk.x"),
        ("curvature: a trace without the bias", "squares += 1", "pass"),
    ],
    "curvature/_solve.py": [
        ("curvature: a residual as it is carried", "g - multiply(u)", "torch.zeros_like(g)"),
    ],
    "curvature/laplace.py": [
        ("curvature: variances of no prior", "predictive_variance", given(prior_precision=1.0)),
    ],
    "curvature/sampling.py": [("curvature: impossible labels", "right=True", "right=False")],
    "mnist/training.py": [
        ("training: step uphill", "parameter.sub_(gradient", "parameter.add_(gradient"),
        ("training: forget the learning rate", "batch_update", given(lr=1.0)),
        ("training: decay the wrong way", "gradient.add(parameter", "gradient.sub(parameter"),
    ],
}
MUTATIONS = [
    Text(name, file, old, new) if isinstance(new, str) else Mutant(name, file, old, new)
    for file, changes in CHANGES.items()
    for name, old, new in changes
]


def main(argv: Sequence[str]) -> int:
    """Run tests with a mutant, and return pytest's exit status."""
    name, *arguments = argv
    (mutant,) = (mutation for mutation in MUTATIONS if mutation.name == name)
    assert isinstance(mutant, Mutant)
    mutant.take_its_place()
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
