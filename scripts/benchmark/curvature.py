"""The problems of the Hessian of a layer: one direction, many at once, and the diagonal."""

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from torch_softmax.curvature import HeadHessian

from .losses import Loss, dense, layer, layer_and_direction, ours, products
from .measure import Options, Place, Problem, Results, Row, Shape, measure

DIRECTIONS = 16


def product_by_func(loss: Loss, x: Tensor, W: Tensor, target: Tensor, u: Tensor) -> Results:
    """The Hessian by W times one direction, or each of many, by `torch.func`."""

    def product(u: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda W: loss(x, W, target))
        along: Tensor = torch.func.jvp(gradient, (W,), (u,))[1]
        return along

    with warnings.catch_warnings():
        # Torch scripts its formulas for forward mode when they are first asked for.
        warnings.filterwarnings("ignore", "`torch.jit.script")
        return (product(u) if u.dim() == 2 else torch.vmap(product)(u),)


def product_by_operator(x: Tensor, W: Tensor, target: Tensor, u: Tensor) -> Results:
    """The same by our operator, with all directions at once."""
    return (HeadHessian(x, W, target) @ u,)


def products_one_by_one(x: Tensor, W: Tensor, target: Tensor, u: Tensor) -> Results:
    """The same by our operator, a direction at a time."""
    hessian = HeadHessian(x, W, target)
    out = torch.empty_like(u, dtype=hessian.dtype)
    for direction, place in zip(u, out, strict=True):
        place.copy_(hessian @ direction)
    return (out,)


def diagonal_by_formula(x: Tensor, W: Tensor, target: Tensor) -> Results:
    """The diagonal as one writes it down, with S held."""
    S = torch.softmax(x @ W.t(), 1)
    return ((S * (1 - S)).t() @ x.square() / len(x),)


def diagonal_by_operator(x: Tensor, W: Tensor, target: Tensor) -> Results:
    """The same by our operator."""
    diagonal = HeadHessian(x, W, target).diagonal()
    assert isinstance(diagonal, Tensor)
    return (diagonal,)


def layer_and_directions(shape: Shape, place: Place) -> Results:
    """A layer, and many directions of its weights."""
    return *layer(shape, place), place.randn(DIRECTIONS, shape.K, shape.D)


HEAD_PRODUCT = Problem(
    section="curvature",
    inputs=layer_and_direction,
    floors={"three products": partial(products, 2, 0, 1)},
    contestants={
        "a direction: dense, torch.func": partial(product_by_func, dense),
        "a direction: ours, torch.func": partial(product_by_func, ours),
        "a direction: ours, HeadHessian": product_by_operator,
    },
    reference="a direction: dense, torch.func",
    yardstick="three products",
)

HEAD_PRODUCTS = Problem(
    section="curvature",
    inputs=layer_and_directions,
    floors={
        f"{1 + 2 * DIRECTIONS} products": partial(products, 1 + DIRECTIONS, 0, DIRECTIONS),
    },
    contestants={
        f"{DIRECTIONS} directions: dense, torch.func": partial(product_by_func, dense),
        f"{DIRECTIONS} directions: ours, one by one": products_one_by_one,
        f"{DIRECTIONS} directions: ours, at once": product_by_operator,
    },
    reference=f"{DIRECTIONS} directions: ours, one by one",
    yardstick=f"{1 + 2 * DIRECTIONS} products",
)

HEAD_DIAGONAL = Problem(
    section="curvature",
    inputs=layer,
    floors={"two products": partial(products, 1, 0, 1)},
    contestants={
        "diagonal: dense, by formula": diagonal_by_formula,
        "diagonal: ours": diagonal_by_operator,
    },
    reference="diagonal: dense, by formula",
    yardstick="two products",
)

# The first is where others are reported to run out of 80 GB.
SHAPES = [
    (HEAD_PRODUCT, Shape(8, 768, 50304), Shape(8, 128, 8192)),
    (HEAD_PRODUCTS, Shape(1024, 256, 16384), Shape(512, 128, 4096)),
    (HEAD_DIAGONAL, Shape(2048, 512, 32768), Shape(512, 128, 8192)),
]


def curvature(options: Options) -> Iterator[Row | str]:
    """Measure the contestants of each problem."""
    for problem, shape, quick_shape in SHAPES:
        yield from measure(problem, [quick_shape if options.quick else shape], options)
