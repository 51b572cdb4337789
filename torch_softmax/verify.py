"""An audit of the derivatives of a differentiable function, claim by claim, as a table."""

import functools
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = tuple[Tensor, ...]
Pair = tuple[Tensors, Tensors]  # what a claim gets, and what it should get

OK, RAISES, WRONG = "ok", "raises", "SILENTLY WRONG"


@dataclass(frozen=True)
class Row:
    """One claim of a report.

    Args:
        name: The claim.
        outcome: 'ok', 'raises' or 'SILENTLY WRONG'.
        error: The worst relative error; None where the claim raises.
        detail: What it raises.
    """

    name: str
    outcome: str
    error: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.1e}"
        detail = textwrap.shorten(self.detail, 70)
        return f"{self.name:<26}{self.outcome:<16}{error:<9}{detail}".rstrip()


@dataclass(frozen=True, repr=False)
class Report:
    """The rows of an audit; its `repr` is a table, and `report[name]` the row of a claim."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return all(row.outcome == OK for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        return {row.name: row for row in self.rows}[name]

    def __repr__(self) -> str:
        return "\n".join(map(str, self.rows))


def audit(
    fn: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    reference: Callable[..., Tensor] | None = None,
    *,
    compiled: bool = False,
) -> Report:
    """Check the derivatives of a function, each way that PyTorch has to take them.

    What is differentiated is Σ_i w_i f_i + ½ Σ_i f_i² of the results f, so that the gradient that
    comes from above depends on the inputs, as it does in the middle of a model. The claims:

        value: f is that of the reference (left out without one);
        inputs unchanged: neither f nor its backward writes into an input;
        backward: the gradient is right;
        second backward: the same graph gives the same gradient again;
        double backward: the Hessian-vector product by backward through backward is right;
        forward mode: the derivative along a direction by a dual number is right;
        forward over reverse: the Hessian-vector product by torch.func.jvp of grad is right;
        under no_grad: so it is where gradients are switched off around it;
        forward over backward: so is the tangent of a plain backward in a level of forward mode;
        vmap of grad: torch.func gives the gradients of a batch that it gives one by one;

    and of torch.compile, which takes a second for each, where these are asked for:

        compiled twice backward: the graph of compiled code gives the same gradient again;
        compiled hvp (eager): the Hessian-vector product by torch.func.grad of grad is right,
        compiled hvp (aot_eager): with either of two backends.

    Args:
        fn: Takes the inputs and returns one tensor. It is called many times, so it must give the
            same result each time.
        inputs: The point to check at, of any shapes. The gradients are those of the inputs that
            require one. Without a reference, take small ones: each number costs four calls.
        reference: The same function in plain differentiable PyTorch operations. It is the truth,
            and called with float64 inputs. Without it, the truth are finite differences, of fn for
            the gradient, and of fn's own backward for second order.
        compiled: Whether to check compiled code as well.

    Returns:
        A report with a row a claim. A relative error is over the largest number of what is
        expected, and allowed to reach √ε of the coarsest dtype among the differentiable inputs.

    Raises:
        TypeError: An input or the result is no tensor.
        ValueError: No input requires a gradient, one of them isn't float64 though there is no
            reference, or the reference returns another shape.

    Example:
        >>> z = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
        >>> report = audit(lambda z: z.exp().sum(1).log(), [z])
        >>> report.ok
        True
        >>> report  # doctest: +ELLIPSIS
        inputs unchanged          ok              0.0e+00
        backward                  ok              ...
        second backward           ok              0.0e+00
        double backward           ok              ...
        forward mode              ok              ...
        forward over reverse      ok              ...
        under no_grad             ok              ...
        forward over backward     ok              ...
        vmap of grad              ok              ...
    """
    _check_inputs(inputs, needs_float64=reference is None)
    subject = _Subject(fn, inputs)
    truth = _Differences(subject) if reference is None else _Reference(reference, inputs)

    def slopes() -> Pair:
        # Along the signs of the gradient, where no two terms of the slope cancel.
        gradient = truth.gradient()
        direction = tuple(_eighths(g).abs() * g.sign() for g in gradient)
        return subject.forward_mode(direction), (_dot(gradient, direction),)

    def products(taken: Callable[[], Tensors]) -> Callable[[], Pair]:
        return lambda: (taken(), truth.hessian_product())

    claims: dict[str, Callable[[], Pair]] = {
        "inputs unchanged": subject.inputs_after_and_before,
        "backward": lambda: (subject.gradient(subject.point()), truth.gradient()),
        "second backward": subject.second_and_first_backward,
        "double backward": products(subject.double_backward),
        "forward mode": slopes,
        "forward over reverse": products(subject.forward_over_reverse),
        "under no_grad": products(subject.under_no_grad),
        "forward over backward": products(subject.forward_over_backward),
        "vmap of grad": subject.batched_and_single_gradients,
    }
    if compiled:
        claims["compiled twice backward"] = subject.compiled().second_and_first_backward
        for backend in ("eager", "aot_eager"):
            claims[f"compiled hvp ({backend})"] = products(
                functools.partial(subject.compiled_product, backend)
            )
    value = subject.value()
    if isinstance(truth, _Reference):
        expected = truth.value()
        _check_shape(expected, value)
        claims = {"value": lambda: ((value,), (expected,)), **claims}
    allowed = max(tolerance(x.dtype) for x in subject.point())
    with warnings.catch_warnings():
        # PyTorch scripts its own formulas for forward mode, and warns that this is deprecated.
        warnings.filterwarnings("ignore", "`torch.jit.script")
        return Report(tuple(judge(name, claim, allowed) for name, claim in claims.items()))


def judge(name: str, claim: Callable[[], Pair], allowed: float) -> Row:
    """The row of a claim that gives what it got and what it should have got, or raises."""
    try:
        error = worst_error(*claim())
    except Exception as raised:  # whatever fn raises is a finding, not a failure of the audit
        return Row(name, RAISES, None, f"{type(raised).__name__}: {raised}")
    return Row(name, OK if error <= allowed else WRONG, error)


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that is allowed for results in a dtype, √ε."""
    return float(torch.finfo(dtype).eps ** 0.5)


def worst_error(actual: Tensors, expected: Tensors) -> float:
    """The largest difference in a tensor over the largest number expected there; or nan."""
    largest = [float(e.double().abs().amax()) if e.numel() else 0.0 for e in expected]
    # Where all of a tensor should be 0, its rounding errors are those of the other tensors.
    floor = 1e-6 * max(largest) or 1.0
    errors = [0.0]
    for a, e, size in zip(actual, expected, largest, strict=True):
        if e.numel():
            errors.append(float((a.double() - e.double()).abs().amax()) / max(size, floor))
    return float(torch.tensor(errors, dtype=torch.float64).amax())


class _Subject:
    """A function, and the derivatives of Σ_i w_i f_i + ½ Σ_i f_i² by each of PyTorch's ways."""

    def __init__(self, fn: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.fn = fn
        self.original = inputs
        self.inputs = [x.detach().clone() for x in inputs]
        self.moving = [i for i, x in enumerate(inputs) if x.requires_grad]
        self.direction = tuple(map(_eighths, self.point()))

    def point(self, factor: float = 1.0) -> Tensors:
        """New leaves for the differentiable inputs, times a factor."""
        return tuple((self.inputs[i] * factor).requires_grad_() for i in self.moving)

    def call(self, *at: Tensor) -> Tensor:
        full = [x.clone() for x in self.inputs]
        for i, x in zip(self.moving, at, strict=True):
            full[i] = x
        return self.fn(*full)

    def total(self, *at: Tensor) -> Tensor:
        # In float64, so that what is judged is the function, and not this sum.
        f = self.call(*at).double()
        return (_eighths(f) * f + f.square() / 2).sum()

    def value(self) -> Tensor:
        with torch.no_grad():
            result = self.call(*self.point())
        if not isinstance(result, Tensor):
            raise TypeError(f"fn must return a tensor, got {type(result).__name__}")
        return result

    def gradient(self, at: Tensors) -> Tensors:
        return _grad(self.total(*at), at)

    def inputs_after_and_before(self) -> Pair:
        after = [x.clone() for x in self.inputs]
        leaves = tuple(after[i].requires_grad_() for i in self.moving)
        _grad(self.fn(*after).square().sum(), leaves)
        return tuple(x.detach() for x in after), tuple(self.inputs)

    def second_and_first_backward(self) -> Pair:
        at = self.point()
        total = self.total(*at)
        first = tuple(g.clone() for g in _grad(total, at, retain_graph=True))
        return _grad(total, at), first

    def double_backward(self) -> Tensors:
        at = self.point()
        first = _grad(self.total(*at), at, create_graph=True)
        return _grad(_dot(first, self.direction), at)

    def forward_mode(self, direction: Tensors) -> Tensors:
        with forward_ad.dual_level():
            pairs = zip(self.point(), direction, strict=True)
            duals = [forward_ad.make_dual(x, u.to(x.dtype)) for x, u in pairs]
            total, tangent = forward_ad.unpack_dual(self.total(*duals))
        return (torch.zeros_like(total) if tangent is None else tangent.detach(),)

    def forward_over_reverse(self) -> Tensors:
        gradient = torch.func.grad(self.total, tuple(range(len(self.moving))))
        along: Tensors = torch.func.jvp(gradient, self.point(), self.direction)[1]
        return tuple(t.detach() for t in along)

    def under_no_grad(self) -> Tensors:
        with torch.no_grad():
            return self.forward_over_reverse()

    def forward_over_backward(self) -> Tensors:
        with forward_ad.dual_level():
            pairs = zip(self.point(), self.direction, strict=True)
            duals = tuple(forward_ad.make_dual(x, u.to(x.dtype)) for x, u in pairs)
            gradient = map(forward_ad.unpack_dual, _grad(self.total(*duals), duals))
            return tuple(
                torch.zeros_like(g.primal) if g.tangent is None else g.tangent.detach()
                for g in gradient
            )

    def compiled(self) -> "_Subject":
        """The same function, compiled, with the backend that changes nothing."""
        torch.compiler.reset()
        return _Subject(torch.compile(self.fn, backend="eager"), self.original)

    def compiled_product(self, backend: str) -> Tensors:
        """The Hessian-vector product by torch.func, compiled as one graph."""
        torch.compiler.reset()
        everything = tuple(range(len(self.moving)))
        gradient: Any = torch.func.grad(self.total, everything)
        slope: Any = torch.func.grad(lambda *at: _dot(gradient(*at), self.direction), everything)
        point = (x.detach() for x in self.point())
        compiled: Any = torch.compile(slope, backend=backend, fullgraph=True)
        products: Tensors = compiled(*point)
        return products

    def batched_and_single_gradients(self) -> Pair:
        points = [self.point(factor) for factor in (1.0, 0.5)]
        batch = [torch.stack(x).detach() for x in zip(*points, strict=True)]
        batched = torch.vmap(torch.func.grad(self.total, tuple(range(len(batch)))))(*batch)
        single = zip(*map(self.gradient, points), strict=True)
        return batched, tuple(map(torch.stack, single))


class _Reference:
    """The truth by automatic differentiation of plain operations in float64."""

    def __init__(self, reference: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.subject = _Subject(reference, list(map(_widened, inputs)))

    def value(self) -> Tensor:
        return self.subject.value()

    def gradient(self) -> Tensors:
        return self.subject.gradient(self.subject.point())

    def hessian_product(self) -> Tensors:
        return self.subject.double_backward()


class _Differences:
    """The truth by differences: of the function for the gradient, and of that for the Hessian."""

    def __init__(self, subject: _Subject) -> None:
        self.subject = subject

    def gradient(self) -> Tensors:
        point = self.subject.point()
        numbers = sum(x.numel() for x in point)

        def total(at: Tensors) -> Tensors:
            with torch.no_grad():
                return (self.subject.total(*at),)

        units = (_split(unit, point) for unit in torch.eye(numbers).double())
        return _split(torch.stack([self._along(unit, total)[0] for unit in units]), point)

    def hessian_product(self) -> Tensors:
        return self._along(self.subject.direction, self.subject.gradient)

    def _along(self, direction: Tensors, function: Callable[[Tensors], Tensors]) -> Tensors:
        """The derivative of a function along a direction, to fourth order in a step."""
        step = 1e-3

        def moved(steps: int) -> Tensors:
            at = zip(self.subject.point(), direction, strict=True)
            return function(tuple((x + steps * step * u).detach().requires_grad_() for x, u in at))

        differences = zip(moved(1), moved(-1), moved(2), moved(-2), strict=True)
        return tuple((8 * (a - b) - (c - d)) / (12 * step) for a, b, c, d in differences)


def _grad(
    total: Tensor, at: Tensors, *, retain_graph: bool = False, create_graph: bool = False
) -> Tensors:
    """The gradient, with zeros for what the total does not depend on."""
    return torch.autograd.grad(
        total,
        at,
        retain_graph=retain_graph or create_graph,
        create_graph=create_graph,
        materialize_grads=True,
    )


def _dot(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _eighths(like: Tensor) -> Tensor:
    """Fixed numbers of a size from ½ to 1½ in the shape of a tensor, exact in every dtype."""
    wave = torch.arange(1.0, like.numel() + 1).square().sin()
    return (wave.sign() * (4 + (8 * wave.abs()).round()) / 8).reshape(like.shape).to(like)


def _split(flat: Tensor, like: Tensors) -> Tensors:
    """The numbers of a vector, in the shapes of some tensors."""
    parts = flat.to(like[0].device).split([x.numel() for x in like])
    return tuple(part.reshape(x.shape) for part, x in zip(parts, like, strict=True))


def _widened(x: Tensor) -> Tensor:
    """A tensor in float64, as far as it holds real numbers."""
    wide = x.detach().double() if x.is_floating_point() else x.detach()
    return wide.requires_grad_(x.requires_grad)


def _check_inputs(inputs: Sequence[Tensor], needs_float64: bool) -> None:
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs must be tensors, got {type(x).__name__}")
    moving = [x for x in inputs if x.requires_grad]
    if not moving:
        raise ValueError("inputs must hold a tensor that requires a gradient, got none")
    for x in moving:
        if needs_float64 and x.dtype != torch.float64:
            raise ValueError(f"inputs must be float64 where there is no reference, got {x.dtype}")


def _check_shape(expected: Tensor, value: Tensor) -> None:
    if expected.shape != value.shape:
        raise ValueError(
            f"reference must return the shape {tuple(value.shape)} that fn returns, "
            f"got {tuple(expected.shape)}"
        )
