"""Softmax regression to its optimum: paths of penalties and single fits, beside scikit-learn's."""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_softmax import SoftmaxRegression
from torch_softmax.mnist.data import load_dataset
from torch_softmax.optim import penalty_path

from .growth import FACTORS, exponent
from .measure import MIB, PROCESSES, SEED, Options, Place, Row, Shape, UnavailableError, reason
from .rivals import require

SECTION = "probe"
LIMIT = 600.0  # seconds for a fit or a path
HESSIAN_LIMIT = 4 * 2**30  # bytes of a Hessian that is held
PATH = [10.0**power for power in range(-6, 6)]
DINO = torch.logspace(-6, 5, 45, dtype=torch.float64).tolist()
# Rows, features and classes of ImageNet's training set and a large vision transformer.
IMAGENET = Shape(1_281_167, 1024, 1000)
PEAK_FLOPS, BANDWIDTH = 67e12, 3.35e12  # of an H100's data sheet: float32, and its memory
PRODUCTS = 290  # of a fit, as C = 1 took at 45,000 rows and 100 classes
RANKS = (1, 8)


class Problem(NamedTuple):
    """Examples, and those held out."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    @property
    def shape(self) -> Shape:
        """N, D, K."""
        rows, features = self.x.shape
        return Shape(rows, features, int(self.y.max()) + 1)


class Fit(NamedTuple):
    """How a contestant did."""

    seconds: float
    objectives: list[float]  # f at each C
    accuracies: list[float]  # on the examples held out


Models = Iterator[tuple[Tensor, Tensor]]  # W (K, D) and b (K,) at each C
Contestant = Callable[[Problem, list[float]], Models]


def probe(options: Options) -> Iterator[Row | str]:
    """Measure paths and fits, tell how they grow, and estimate ImageNet's."""
    place = options.place._replace(device="cpu", dtype=torch.float32)
    first, held = (600, 100) if options.quick else (6000, 1000)
    yield from compare("path of 12", pixels(options, first, held), PATH, {**PATHS, **EXACT}, place)
    rows, features = (2000, 64) if options.quick else (50_000, 512)
    for classes in (10,) if options.quick else (10, 100):
        problem = convolved(options, rows, features, classes)
        yield from compare("C=1", problem, [1.0], FITS, place)
        yield from compare("path of 45", problem, DINO, PATHS, place)
    yield from growth(options, place)
    yield from estimate()


def pixels(options: Options, rows: int, held: int) -> Problem:
    """Some of MNIST's images as they are."""
    data = load_dataset("mnist", options.data_dir).train
    x, y = data.images[:rows].float() / data.max_pixel, data.labels[:rows].long()
    return Problem(x[:-held], y[:-held], x[-held:], y[-held:])


def convolved(options: Options, rows: int, features: int, classes: int) -> Problem:
    """Features of MNIST's images by a random convolution; 10 digits, or clusters of features."""
    data = load_dataset("mnist", options.data_dir).train
    images, y = data.images[:rows], data.labels[:rows].long()
    side = int(images.shape[1] ** 0.5)
    generator = torch.Generator().manual_seed(SEED)
    kernels = torch.randn(features // 4, 1, 7, 7, generator=generator)
    x = torch.cat(
        [
            F.adaptive_avg_pool2d(F.conv2d(part.float().view(-1, 1, side, side), kernels).relu(), 2)
            for part in images.split(500)
        ]
    ).flatten(1)
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    if classes != 10:
        y = clusters(x, classes, generator)
    held = rows // 10
    return Problem(x[:-held], y[:-held], x[-held:], y[-held:])


def clusters(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The nearest of some rows to each row, a tenth of them replaced by another."""
    centres = x[torch.randperm(len(x), generator=generator)[:count]]
    y = torch.cat([torch.cdist(part, centres).argmin(1) for part in x.split(5000)])
    other = torch.randint(count, y.shape, generator=generator)
    return torch.where(torch.rand(len(y), generator=generator) < 0.1, other, y)


def compare(
    title: str, problem: Problem, Cs: list[float], contestants: dict[str, Contestant], place: Place
) -> Iterator[Row | str]:
    """Let each contestant go along the same C, and tell how low its objective is."""
    fits: dict[str, Fit] = {}
    for name, contestant in contestants.items():
        try:
            fits[name] = limited(partial(run, contestant, problem, Cs, place.threads))
        except Exception as error:
            yield f"{SECTION}, {title} at {problem.shape} without {name}: {reason(error)}"
    best = [min(values) for values in zip(*(fit.objectives for fit in fits.values()), strict=True)]
    for name, fit in fits.items():
        ratio = fit.seconds / fits[OURS].seconds if OURS in fits else float("nan")
        yield Row(SECTION, str(problem.shape), f"{title}, {name}", fit.seconds, ratio, None, place)
        above = max(f / low - 1 for f, low in zip(fit.objectives, best, strict=True))
        right = max(fit.accuracies)
        yield f"  {name}: objective within {above:.1e} of the lowest, held out {right:.2%}"


def run(contestant: Contestant, problem: Problem, Cs: list[float], threads: int) -> Fit:
    """Fit in this process."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those who have not converged; their objective tells
        models = list(contestant(problem, Cs))
    seconds = time.perf_counter() - start
    objectives = [objective(problem, C, *model) for C, model in zip(Cs, models, strict=True)]
    return Fit(seconds, objectives, [accuracy(problem, *model) for model in models])


def objective(problem: Problem, C: float, W: Tensor, b: Tensor) -> float:
    """The mean loss with the penalty, in float64."""
    W, b = W.double(), b.double()
    losses = [
        F.cross_entropy(F.linear(x.double(), W, b), y, reduction="sum")
        for x, y in zip(problem.x.split(5000), problem.y.split(5000), strict=True)
    ]
    return float(torch.stack(losses).sum() + W.square().sum() / (2 * C)) / len(problem.x)


def accuracy(problem: Problem, W: Tensor, b: Tensor) -> float:
    """On the examples held out."""
    predicted = F.linear(problem.held_x, W.float(), b.float()).argmax(1)
    return float((predicted == problem.held_y).float().mean())


def limited(function: Callable[[], Fit]) -> Fit:
    """Call a function in a process of its own, which is ended where it takes too long."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(  # type: ignore[attr-defined]
        target=answer, args=(theirs, function), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT):
            raise UnavailableError(f"not done in {LIMIT:.0f} s")
        result = ours.recv()
    except EOFError:
        raise UnavailableError("its process was killed, mostly for want of memory") from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, Fit)
    return result


def answer(pipe: Any, function: Callable[[], Fit]) -> None:
    """Send what a function returns or raises."""
    try:
        pipe.send(function())
    except Exception as error:
        pipe.send(UnavailableError(reason(error)))


# The contestants.


def ours(
    problem: Problem, Cs: list[float], dtype: torch.dtype, weight_tolerance: float | None
) -> Models:
    """The path from strong to weak penalties, as `SoftmaxClassifierCV` goes it."""
    count, features, classes = problem.shape
    model = SoftmaxRegression(features, classes, dtype=dtype)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    penalties = [1 / (C * count) for C in Cs]
    path = penalty_path(
        model,
        problem.x.to(dtype),
        problem.y,
        penalties,
        tolerance=1e-5,
        weight_tolerance=weight_tolerance,
    )
    for fitted in path:
        yield fitted.model.weight.detach(), fitted.model.bias.detach()


def scikit_learn(solver: str, problem: Problem, Cs: list[float]) -> Models:
    """LogisticRegression, warm-started from strong to weak penalties."""
    linear_model = require("sklearn.linear_model", '"torch_softmax[sklearn]"')
    classifier = linear_model.LogisticRegression(
        solver=solver, tol=1e-5, max_iter=10_000, warm_start=True
    )
    _, features, classes = problem.shape
    hessian = 8 * (classes * (features + 1)) ** 2
    if solver == "newton-cholesky" and hessian > HESSIAN_LIMIT:
        raise UnavailableError(f"its Hessian would take {hessian / MIB:,.0f} MiB")
    x, y = problem.x.numpy(), problem.y.numpy()
    for C in Cs:
        classifier.set_params(C=C).fit(x, y)
        yield torch.tensor(classifier.coef_), torch.tensor(classifier.intercept_)


def torch_lbfgs(problem: Problem, Cs: list[float]) -> Models:
    """The L-BFGS of torch with a line search, warm-started too."""
    count, features, classes = problem.shape
    W = torch.zeros(classes, features, requires_grad=True)
    b = torch.zeros(classes, requires_grad=True)
    for C in Cs:
        optimizer = torch.optim.LBFGS(
            [W, b],
            max_iter=10_000,
            tolerance_grad=1e-5,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure(C: float = C, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(problem.x, W, b), problem.y)
            loss = loss + W.square().sum() / (2 * C * count)
            loss.backward()
            return loss.item()

        optimizer.step(closure)
        yield W.detach().clone(), b.detach().clone()


# To the gradient that scikit-learn is asked for, by a norm that is at least as large as its own.
OURS = "ours, float32"
PATHS: dict[str, Contestant] = {
    OURS: partial(ours, dtype=torch.float32, weight_tolerance=None),
    "ours, float64": partial(ours, dtype=torch.float64, weight_tolerance=None),
    "scikit-learn, lbfgs": partial(scikit_learn, "lbfgs"),
}
# To the weights that the estimator promises.
EXACT: dict[str, Contestant] = {
    "ours, float64, weights to 1e-4": partial(ours, dtype=torch.float64, weight_tolerance=1e-4),
}
FITS: dict[str, Contestant] = {
    **PATHS,
    **EXACT,
    "scikit-learn, newton-cg": partial(scikit_learn, "newton-cg"),
    "scikit-learn, newton-cholesky": partial(scikit_learn, "newton-cholesky"),
    "torch, L-BFGS": torch_lbfgs,
}


# Growth and an estimate.


def growth(options: Options, place: Place) -> Iterator[Row | str]:
    """Double N, D and K, each by itself, for a fit at C = 1."""
    base = Shape(500, 16, 5) if options.quick else Shape(5000, 128, 20)
    for size in Shape._fields:
        seconds = []
        for factor in FACTORS:
            problem = drawn(base._replace(**{size: getattr(base, size) * factor}))
            fit = min(run(PATHS[OURS], problem, [1.0], place.threads) for _ in range(2))
            name = f"growth with {size}, {OURS}"
            yield Row(SECTION, str(problem.shape), name, fit.seconds, 1.0, None, place)
            seconds.append(fit.seconds)
        yield f"growth of a fit with {size}: time to the power {exponent(FACTORS, seconds):.2f}"


def drawn(shape: Shape) -> Problem:
    """Classes drawn by a softmax of random features."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(shape.N, shape.D, generator=generator)
    W = torch.randn(shape.K, shape.D, generator=generator) / shape.D**0.5
    noise = torch.rand(shape.N, shape.K, generator=generator).log().neg().log()
    y = (3 * x @ W.t() - noise).argmax(1)
    y[: shape.K] = torch.arange(shape.K)
    return Problem(x, y, x[:100], y[:100])


def estimate() -> Iterator[str]:
    """What a fit of ImageNet's features would take on GPUs, by formulas and not measured."""
    N, D, K = IMAGENET
    flops = PRODUCTS * 4 * N * D * K
    yield (
        f"estimate, not measured: {N:,} rows, {D} features, {K} classes, float32, "
        f"{PRODUCTS} Hessian-vector products of {4 * N * D * K:.1e} FLOPs"
    )
    for ranks in RANKS:
        rows = N // ranks
        read = PRODUCTS * (2 * rows * D + 3 * rows * K) * 4
        held = (rows * D + rows * K) * 4 + 100 * K * (D + 1) * 8
        sent = PRODUCTS * 2 * (ranks - 1) / ranks * K * (D + 1) * 8
        seconds = max(flops / ranks / PEAK_FLOPS, read / BANDWIDTH)
        yield (
            f"  {ranks} H100: at least {seconds:.0f} s ({flops / ranks:.1e} FLOPs, "
            f"{read / 1e12:.1f} TB read), {held / MIB:,.0f} MiB a rank for X, softmaxes and "
            f"directions, {sent / MIB:,.0f} MiB sent by a rank"
        )
