"""Newton's method: its optimum, its steps, and what it refuses."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.regression import CLASSES, WEIGHT_DECAY, probabilities
from torch_softmax import SoftmaxRegression
from torch_softmax.optim import Rows, _descent, _hessian, _objective, newton


def new_model(dtype=torch.float64, features=64, **options):
    return SoftmaxRegression(features, CLASSES, dtype=dtype, **options)


def objective(model, input, target, weight_decay):
    """The mean loss with the penalty, by torch's own layer and loss."""
    loss = F.cross_entropy(F.linear(input, model.weight, model.bias), target)
    return loss + 0.5 * weight_decay * model.weight.square().sum()


def gradient_norm(model, input, target, weight_decay):
    value = objective(model, input, target, weight_decay)
    gradients = torch.autograd.grad(value, tuple(model.parameters()))
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


def assert_same_parameters(actual, expected, **tolerances):
    for a, e in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, e, **tolerances)


# The optimum


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_decay", [1e-4, 0.1])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-11])
def test_gradient_is_below_the_tolerance(examples, tolerance, weight_decay, bias):
    model = new_model(bias=bias)
    result = newton.minimize(model, *examples, weight_decay, tolerance=tolerance)
    assert result.converged
    assert gradient_norm(model, *examples, weight_decay) <= tolerance


def test_gradient_of_float32_is_below_the_tolerance(examples):
    input, target = examples
    model = new_model(torch.float32)
    assert newton.minimize(model, input.float(), target, WEIGHT_DECAY).converged
    assert gradient_norm(model.double(), input, target, WEIGHT_DECAY) <= 1e-4


@pytest.mark.parametrize("weight_decay", [0.0, WEIGHT_DECAY])
def test_result_is_that_of_the_model(examples, weight_decay):
    model = new_model()
    result = newton.minimize(model, *examples, weight_decay, tolerance=0.01)
    assert result.objective == pytest.approx(
        objective(model, *examples, weight_decay).item(), rel=1e-12
    )
    assert result.gradient_norm == pytest.approx(
        gradient_norm(model, *examples, weight_decay), rel=1e-9
    )


def test_agrees_with_scikit_learn(digits, examples):
    linear_model = pytest.importorskip("sklearn.linear_model")
    input, target = examples
    C = 1 / (WEIGHT_DECAY * len(target))
    theirs = linear_model.LogisticRegression(C=C, tol=1e-10, max_iter=10_000)
    theirs.fit(input.numpy(), target.numpy())
    ours = new_model()
    newton.minimize(ours, input, target, WEIGHT_DECAY, tolerance=1e-8)

    test_input = digits.test.images.double() / digits.test.max_pixel
    probability = torch.from_numpy(theirs.predict_proba(test_input.numpy()))
    torch.testing.assert_close(ours.predict_proba(test_input), probability, rtol=0, atol=1e-5)
    assert torch.equal(ours.predict(test_input), probability.argmax(1))


def test_start_does_not_matter(examples):
    first, second = new_model(), new_model()
    with torch.no_grad():
        second.weight.mul_(100)  # the loss starts at 17
        second.bias.add_(5)
    for model in (first, second):
        newton.minimize(model, *examples, WEIGHT_DECAY, tolerance=1e-10)
    assert_same_parameters(second, first, rtol=0, atol=1e-6)


def overlapping(features, classes=2, seed=0):
    """Examples that no plane separates."""
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(300, features, generator=generator, dtype=torch.float64)
    scores = input @ torch.randn(features, classes, generator=generator, dtype=torch.float64)
    noise = torch.rand(300, classes, generator=generator, dtype=torch.float64)
    return input, (scores - noise.log().neg().log()).argmax(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mean", [100, 2000])
def test_where_the_features_lie_does_not_matter(mean, seed):
    input, target = overlapping(1, seed=seed)
    torch.manual_seed(seed)
    near, far = (SoftmaxRegression(1, 2, dtype=torch.float64) for _ in range(2))
    at_0 = newton.minimize(near, input, target, 0.0, tolerance=1e-9)
    away = newton.minimize(far, input + mean, target, 0.0, tolerance=1e-6)
    assert away.converged
    assert away.objective == pytest.approx(at_0.objective, abs=1e-9)


def test_a_mean_that_is_large_for_float32():
    input, target = overlapping(1)
    far = (input + 100).float()
    model, exact = SoftmaxRegression(1, 2), SoftmaxRegression(1, 2, dtype=torch.float64)
    result = newton.minimize(model, far, target, 0.0)
    expected = newton.minimize(exact, far.double(), target, 0.0, tolerance=1e-9)
    # The bias is rounded to some 1e-5, which the mean multiplies.
    assert result.gradient_norm <= 5e-4
    assert result.converged or result.reachable == result.gradient_norm
    assert result.objective == pytest.approx(expected.objective, abs=1e-8)


def test_units_of_the_features_do_not_matter():
    input, target = overlapping(7, classes=4)
    units = torch.logspace(-2, 4, 7, dtype=torch.float64)
    same, different = (SoftmaxRegression(7, 4, dtype=torch.float64) for _ in range(2))
    expected = newton.minimize(same, input, target, 0.0, tolerance=1e-9)
    result = newton.minimize(different, input * units, target, 0.0, tolerance=1e-5)
    assert result.converged
    assert result.steps <= 2 * expected.steps
    assert result.objective == pytest.approx(expected.objective, abs=1e-9)


@pytest.mark.parametrize("C", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("name", ["wine", "iris", "breast_cancer"])
def test_small_tables_of_scikit_learn(name, C):
    datasets, linear_model = (
        pytest.importorskip(f"sklearn.{room}") for room in ("datasets", "linear_model")
    )
    X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    classes = int(y.max()) + 1
    theirs = linear_model.LogisticRegression(
        C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000
    ).fit(X, y)
    input, target = torch.from_numpy(X), torch.from_numpy(y)
    ours = SoftmaxRegression(X.shape[1], classes, dtype=torch.float64)
    weight_decay = (2 if classes == 2 else 1) / (C * len(y))
    result = newton.minimize(ours, input, target, weight_decay, tolerance=1e-8)
    assert result.converged
    assert result.steps <= 30
    expected = torch.from_numpy(theirs.predict_proba(X))
    torch.testing.assert_close(ours.predict_proba(input), expected, rtol=0, atol=1e-5)


def test_the_model_itself_is_the_start_where_it_is_better_than_zeros(examples):
    model = new_model()
    newton.minimize(model, *examples, WEIGHT_DECAY, tolerance=1e-3)
    again = newton.minimize(model, *examples, WEIGHT_DECAY, tolerance=1e-6)
    assert again.steps < newton.minimize(new_model(), *examples, WEIGHT_DECAY, tolerance=1e-6).steps


def test_autocast_around_it_makes_no_difference(examples):
    input, target = examples
    plain, within = new_model(torch.float32), new_model(torch.float32)
    newton.minimize(plain, input.float(), target, WEIGHT_DECAY)
    with torch.autocast("cpu", torch.bfloat16):
        newton.minimize(within, input.float(), target, WEIGHT_DECAY)
    assert_same_parameters(within, plain, rtol=0, atol=1e-5)


def test_a_class_without_examples_converges(examples):
    input, target = examples
    absent = target == 3
    result = newton.minimize(
        new_model(), input[~absent], target[~absent], WEIGHT_DECAY, tolerance=1e-7
    )
    assert result.converged


@pytest.mark.parametrize("weight_decay", [0.0, WEIGHT_DECAY])
def test_a_start_without_any_curvature(examples, weight_decay):
    model = new_model()
    with torch.no_grad():
        model.weight.normal_().mul_(1e5)  # S is one-hot, and mostly of a wrong class
    assert newton.minimize(model, *examples, weight_decay).converged


def test_what_all_classes_share_is_taken_off(examples):
    model = new_model()
    newton.minimize(model, *examples, WEIGHT_DECAY)
    for parameter in model.parameters():
        shared = parameter.detach().mean(0)
        torch.testing.assert_close(shared, torch.zeros_like(shared), rtol=0, atol=1e-12)


def test_nothing_is_done_at_the_optimum(examples):
    model = new_model()
    newton.minimize(model, *examples, WEIGHT_DECAY)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = newton.minimize(model, *examples, WEIGHT_DECAY, tolerance=2e-4, report=pytest.fail)
    assert result.converged
    assert (result.steps, result.products) == (0, 0)
    for parameter, expected in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12)


def test_one_class_has_nothing_to_learn():
    model = SoftmaxRegression(3, 1)
    result = newton.minimize(model, torch.randn(5, 3), torch.zeros(5, dtype=torch.long), 0.1)
    assert result == newton.Result(0.0, 0.0, 0.0, 0, 0, converged=True)


# The data


def test_input_need_not_be_contiguous(examples):
    input, target = examples
    straight, turned = new_model(), new_model()
    turned.load_state_dict(straight.state_dict())
    newton.minimize(straight, input, target, WEIGHT_DECAY)
    newton.minimize(turned, input.t().contiguous().t(), target, WEIGHT_DECAY)
    assert_same_parameters(turned, straight, rtol=0, atol=0)


def test_leading_dimensions_are_examples(examples):
    input, target = examples
    flat, folded = new_model(), new_model()
    folded.load_state_dict(flat.state_dict())
    newton.minimize(flat, input, target, WEIGHT_DECAY)
    newton.minimize(folded, input.view(2, -1, 64), target.view(2, -1), WEIGHT_DECAY)
    assert_same_parameters(folded, flat, rtol=0, atol=0)


def test_one_hot_probabilities_are_class_indices(examples):
    input, target = examples
    by_index, by_probability = new_model(), new_model()
    one_hot = F.one_hot(target, CLASSES).double()
    newton.minimize(by_index, input, target, WEIGHT_DECAY, tolerance=1e-10)
    newton.minimize(by_probability, input, one_hot, WEIGHT_DECAY, tolerance=1e-10)
    assert_same_parameters(by_probability, by_index, rtol=0, atol=1e-6)


def test_probabilities_of_any_sum(examples):
    input, target = examples
    model, p = new_model(), probabilities(target)
    assert newton.minimize(model, input, p, WEIGHT_DECAY, tolerance=1e-8).converged
    assert gradient_norm(model, input, p, WEIGHT_DECAY) <= 1e-8


def test_an_ignored_example_is_left_out(examples):
    input, target = examples
    some = target.clone()
    some[::3] = newton.IGNORED
    model = new_model()
    newton.minimize(model, input, some, WEIGHT_DECAY, tolerance=1e-8)
    assert gradient_norm(model, input, some, WEIGHT_DECAY) <= 1e-8


def test_a_class_without_examples_is_never_predicted(examples):
    input, target = examples
    absent = target == 3
    model = new_model()
    assert newton.minimize(model, input[~absent], target[~absent], WEIGHT_DECAY).converged
    assert not (model.predict(input) == 3).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-30])
def test_separable_classes_without_a_penalty(dtype, tolerance):
    # f has no minimum: it falls towards 0 as the weight grows without end.
    input = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]], dtype=dtype)
    target = torch.tensor([0, 0, 1, 1])
    model = SoftmaxRegression(1, 2, dtype=dtype)
    result = newton.minimize(model, input, target, 0.0, tolerance=tolerance)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert result.converged == (gradient_norm(model, input, target, 0.0) <= tolerance)
    assert result.objective < 1e-3


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_features_that_depend_on_one_another_without_a_penalty(examples, scale):
    # The matrix of the preconditioner would be singular.
    input, target = examples
    input = (torch.cat([input, input, torch.zeros(len(input), 2)], 1) * scale).float()
    target = torch.randint(CLASSES, target.shape)  # can't be told apart
    model = new_model(torch.float32, features=130)
    assert newton.minimize(model, input, target, 0.0, tolerance=1e-3 * scale).converged


# Weights of examples


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_integer_weights_are_repeated_examples(examples, kind):
    input, target = examples
    if kind == "probabilities":
        target = probabilities(target)
    weight = torch.randint(4, (len(target),))
    weighted, repeated = new_model(), new_model()
    options = {"tolerance": 1e-11}
    result = newton.minimize(weighted, input, target, WEIGHT_DECAY, sample_weight=weight, **options)
    expected = newton.minimize(
        repeated,
        input.repeat_interleave(weight, 0),
        target.repeat_interleave(weight, 0),
        WEIGHT_DECAY,
        **options,
    )
    assert result.objective == pytest.approx(expected.objective, rel=1e-12)
    assert_same_parameters(weighted, repeated, rtol=0, atol=1e-7)


def test_weights_of_one_are_none(examples):
    plain, weighted = new_model(), new_model()
    ones = torch.ones(len(examples[1]))
    newton.minimize(plain, *examples, WEIGHT_DECAY, tolerance=1e-10)
    newton.minimize(weighted, *examples, WEIGHT_DECAY, sample_weight=ones, tolerance=1e-10)
    assert_same_parameters(weighted, plain, rtol=0, atol=1e-7)


def test_an_example_of_weight_0_is_not_looked_at(examples):
    input, target = examples[0].clone(), examples[1]
    input[0] = math.nan
    weight = torch.ones(len(target))
    weight[0] = 0
    with_it, without = new_model(), new_model()
    newton.minimize(with_it, input, target, WEIGHT_DECAY, sample_weight=weight, tolerance=1e-10)
    newton.minimize(without, input[1:], target[1:], WEIGHT_DECAY, tolerance=1e-10)
    assert_same_parameters(with_it, without, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [1e-300, 1e-46, 1e60])
def test_the_size_of_the_weights_makes_no_difference_in_float32(examples, size):
    input, target = examples[0].float(), examples[1]
    weight = torch.rand(len(target), dtype=torch.float64)
    one, other = new_model(torch.float32), new_model(torch.float32)
    newton.minimize(one, input, target, WEIGHT_DECAY, sample_weight=weight)
    newton.minimize(other, input, target, WEIGHT_DECAY, sample_weight=size * weight)
    assert_same_parameters(other, one, rtol=0, atol=1e-4)


def test_weights_without_a_finite_sum_are_refused(examples):
    weight = torch.full((len(examples[1]),), 1e308, dtype=torch.float64)
    with pytest.raises(ValueError, match="sample_weight must have a finite mean above 0, got inf"):
        newton.minimize(new_model(), *examples, WEIGHT_DECAY, sample_weight=weight)


def test_complex_weights_are_refused(examples):
    weight = torch.ones(len(examples[1]), dtype=torch.complex64)
    with pytest.raises(TypeError, match="sample_weight must hold real numbers"):
        newton.minimize(new_model(), *examples, WEIGHT_DECAY, sample_weight=weight)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(examples, value):
    weight = torch.ones(len(examples[1]))
    weight[3] = value
    with pytest.raises(ValueError, match="sample_weight must hold finite numbers of at least 0"):
        newton.minimize(new_model(), *examples, WEIGHT_DECAY, sample_weight=weight)


def test_weights_that_are_all_0_are_refused(examples):
    weight = torch.zeros(len(examples[1]))
    with pytest.raises(ValueError, match="at least one example of a weight above 0"):
        newton.minimize(new_model(), *examples, WEIGHT_DECAY, sample_weight=weight)


# How near


@pytest.mark.parametrize("weight_decay", [1e-7, 1e-3])
def test_weights_are_as_near_to_the_optimum_as_asked_for(examples, weight_decay):
    model, exact = new_model(), new_model()
    newton.minimize(model, *examples, weight_decay, weight_tolerance=1e-3)
    newton.minimize(exact, *examples, weight_decay, weight_tolerance=1e-8)
    assert (model.weight - exact.weight).norm() <= 1.01e-3 * exact.weight.norm()


@pytest.mark.parametrize("seed", range(4))
def test_what_rounding_leaves_is_known_and_not_looped_for(seed):
    input, target = overlapping(1, seed=seed)
    far = (input + 2000).float()
    torch.manual_seed(seed)
    result = newton.minimize(SoftmaxRegression(1, 2), far, target, 0.0, tolerance=1e-9)
    assert not result.converged
    assert result.steps <= 20
    assert 0 < result.gradient_norm <= 30 * result.reachable


@pytest.mark.parametrize("kind", ["indices", "probabilities", "weights"])
@pytest.mark.parametrize("weight_decay", [1e-9, 1e-7])
def test_float32_comes_to_the_optimum_at_weak_penalties(examples, weight_decay, kind):
    input, target = examples
    input = input.float()
    target = probabilities(target).float() if kind == "probabilities" else target
    weight = torch.rand(len(input), dtype=torch.float64) if kind == "weights" else None
    options = {"sample_weight": weight, "max_steps": 200}
    model, exact = new_model(torch.float32), new_model()
    newton.minimize(model, input, target, weight_decay, weight_tolerance=1e-4, **options)
    expected = newton.minimize(
        exact, input.double(), target, weight_decay, weight_tolerance=1e-6, **options
    )
    f = _objective.Objective(input.double(), target, CLASSES, weight_decay, True, weight)
    v = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach().double()
    assert f.at(v).value == pytest.approx(expected.objective, rel=1e-7)


# Rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.int64])
@pytest.mark.parametrize("as_array", [False, True])
def test_rows_of_any_dtype_are_the_examples_that_they_stand_for(digits, dtype, as_array):
    pixels, target = digits.train.images.to(dtype), digits.train.labels
    x = pixels.numpy() if as_array else pixels
    mean = pixels.double().mean(0)
    ours, plain = new_model(), new_model()
    rows = Rows(x, shift=mean, scale=1 / 16)
    newton.minimize(ours, rows, target, WEIGHT_DECAY, tolerance=1e-10)
    newton.minimize(plain, (pixels.double() - mean) / 16, target, WEIGHT_DECAY, tolerance=1e-10)
    assert_same_parameters(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_rows_are_shifted_before_they_are_rounded(dtype):
    x = torch.tensor([[10**9 + 1], [10**9 + 2]]).to(dtype)
    rows = Rows(x, shift=1e9, scale=0.5).read(slice(0, 2))
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize("classes", [CLASSES, 40], ids=["few classes", "many classes"])
@pytest.mark.parametrize("rows", [0, 600], ids=["none", "some"])
def test_logits_that_do_not_fit_are_worked_out_again(examples, monkeypatch, classes, rows):
    input, target = examples
    target = (target + 10 * torch.arange(len(target))) % classes
    monkeypatch.setattr(_hessian, "_CACHED_INPUT", 1)  # 512 rows in a chunk
    held, again = (SoftmaxRegression(64, classes, dtype=torch.float64) for _ in range(2))
    again.load_state_dict(held.state_dict())
    newton.minimize(held, input, target, WEIGHT_DECAY)
    monkeypatch.setattr(_objective, "rows_to_hold", lambda *_: 2 * rows)
    newton.minimize(again, input, target, WEIGHT_DECAY)
    assert_same_parameters(again, held, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 600, 1442])
def test_a_shorter_step_has_its_own_logits_whatever_fits(examples, monkeypatch, rows):
    input, target = examples
    monkeypatch.setattr(_hessian, "_CACHED_INPUT", 1)
    monkeypatch.setattr(_objective, "rows_to_hold", lambda *_: 2 * rows)
    f = _objective.Objective(input, target, 40, WEIGHT_DECAY, True)
    point = f.at(torch.randn(40, 65, dtype=torch.float64))
    descended = _descent.descend(f, point, -1000 * point.gradient)
    exact = f.at(descended.v)
    assert descended.value == pytest.approx(exact.value, rel=1e-14)
    torch.testing.assert_close(descended.gradient, exact.gradient, rtol=0, atol=1e-15)


# Steps


def test_every_step_is_reported_and_descends(examples):
    model = new_model()
    reported, actual = [], []

    def report(result):
        reported.append(result)
        actual.append(objective(model, *examples, WEIGHT_DECAY).item())

    start = objective(model, *examples, WEIGHT_DECAY).item()
    result = newton.minimize(model, *examples, WEIGHT_DECAY, report=report)
    assert reported[-1] == result
    assert [r.steps for r in reported] == list(range(1, result.steps + 1))
    assert [r.objective for r in reported] == pytest.approx(actual, rel=1e-12)
    assert [start, *actual] == sorted([start, *actual], reverse=True)


@pytest.mark.parametrize("max_steps", [0, 1, 3])
def test_max_steps_end_it_without_convergence(examples, max_steps):
    model = new_model()
    result = newton.minimize(model, *examples, WEIGHT_DECAY, tolerance=1e-8, max_steps=max_steps)
    assert (result.steps, result.converged) == (max_steps, False)
    assert result.gradient_norm > 1e-8


def test_a_tolerance_below_rounding_is_never_claimed(examples):
    input, target = examples
    model = new_model(torch.float32)
    result = newton.minimize(
        model, input.float(), target, WEIGHT_DECAY, tolerance=1e-12, max_steps=20
    )
    assert not result.converged


def test_memory_of_the_step_before_saves_products(examples, monkeypatch):
    model, forgetful = new_model(), new_model()
    forgetful.load_state_dict(model.state_dict())
    result = newton.minimize(model, *examples, WEIGHT_DECAY)
    solve = _descent.solve

    def forgetting(*arguments, **options):
        return solve(*arguments, **options)._replace(known=None)

    monkeypatch.setattr(_descent, "solve", forgetting)
    assert result.products < newton.minimize(forgetful, *examples, WEIGHT_DECAY).products


def test_a_step_that_goes_too_far_is_shortened(problem):
    f, v, *_ = problem
    point = f.at(v)
    below = _descent.descend(f, point, -1000 * point.gradient)
    assert below.value < point.value


class RowProducts(TorchDispatchMode):
    """Counts the products that make something of each row, and those that add up over rows."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.made, self.added = rows, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            if self.rows in result.shape:
                self.made += 1
            elif any(self.rows in t.shape for t in args if isinstance(t, torch.Tensor)):
                self.added += CLASSES in result.shape  # or they are moments
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_made_once_a_step(examples, dtype):
    input, target = examples
    with RowProducts(len(input)) as counted:
        result = newton.minimize(new_model(dtype), input.to(dtype), target, WEIGHT_DECAY)
    assert result.steps > 3
    # The start is compared with parameters of 0, all steps are whole, and the last parameters are
    # looked at as they are rounded.
    expected = 2 + result.steps + result.products + (dtype == torch.float32)
    assert (counted.made, counted.added) == (expected, expected)


@pytest.mark.parametrize("times", [0.01, 100, 10_000])
def test_a_trial_of_the_line_search_takes_no_product(problem, times):
    f, v, input, _ = problem
    point = f.at(v)
    with RowProducts(len(input)) as counted:
        descended = _descent.descend(f, point, -times * point.gradient)
    whole = torch.allclose(descended.v, v - times * point.gradient)
    assert whole == (times < 1)
    # The logits at its end, and the gradient where it leads.
    assert (counted.made, counted.added) == (1, 1)


@pytest.mark.parametrize("times", [0.01, 100])
def test_logits_of_a_point_are_those_of_its_parameters(problem, times):
    f, v, *_ = problem
    point = f.at(v)
    descended = _descent.descend(f, point, -times * point.gradient)
    exact = f.at(descended.v)
    assert descended.value == pytest.approx(exact.value, rel=1e-14)
    torch.testing.assert_close(descended.gradient, exact.gradient, rtol=0, atol=1e-15)


def test_no_step_goes_uphill(problem):
    f, v, *_ = problem
    point = f.at(v)
    assert _descent.descend(f, point, 1e-9 * point.gradient) is None


def test_it_ends_unconverged_where_nothing_descends(examples, monkeypatch):
    tried = []
    monkeypatch.setattr(_descent, "descend", lambda *arguments: tried.append(arguments))
    result = newton.minimize(new_model(), *examples, WEIGHT_DECAY, report=pytest.fail)
    assert len(tried) == 1
    assert (result.steps, result.converged) == (0, False)


# What is refused


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("weight_decay", -0.1, ValueError),
        ("weight_decay", math.nan, ValueError),
        ("weight_decay", math.inf, ValueError),
        ("tolerance", 0.0, ValueError),
        ("tolerance", math.inf, ValueError),
        ("max_steps", -1, ValueError),
        ("max_steps", 2.0, TypeError),
        ("input", torch.zeros(4, 5, dtype=torch.float64), ValueError),
        ("input", torch.zeros(4, 64), TypeError),
        ("input", torch.zeros(4, 64, dtype=torch.uint8), TypeError),
        ("input", torch.full((4, 64), math.nan, dtype=torch.float64), ValueError),
        ("target", torch.tensor([0, 1, 2]), ValueError),
        ("target", torch.tensor([0, 1, 2, CLASSES]), ValueError),
        ("target", torch.full((4, CLASSES), -1.0), ValueError),
    ],
)
def test_an_unfit_argument_is_named(name, value, error):
    arguments = {
        "input": torch.zeros(4, 64, dtype=torch.float64),
        "target": torch.tensor([0, 1, 2, 3]),
        "weight_decay": 0.1,
    }
    with pytest.raises(error, match=rf"\b{name}\b.* must "):
        newton.minimize(new_model(), **{**arguments, name: value})


def with_weight_norm():
    return torch.nn.utils.parametrizations.weight_norm(new_model())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (with_weight_norm, ValueError, "must hold its weight as a parameter"),
        (lambda: torch.nn.Linear(64, CLASSES), TypeError, "must be a SoftmaxRegression"),
        (lambda: new_model(device="meta"), ValueError, "must be on a device that holds numbers"),
    ],
    ids=["weight_norm", "Linear", "meta"],
)
def test_a_model_that_can_not_be_updated_is_refused(make, error, message):
    input = torch.zeros(4, 64, dtype=torch.float64)
    with pytest.raises(error, match=message):
        newton.minimize(make(), input, torch.tensor([0, 1, 2, 3]), 0.1)


def test_numbers_whose_squares_are_not_finite_are_refused():
    input = torch.tensor([[1e24], [-1e24], [3e24], [0.0]])
    with pytest.raises(ValueError, match="input must hold numbers whose squares are finite"):
        newton.minimize(SoftmaxRegression(1, 2), input, torch.tensor([0, 1, 0, 1]), 0.0)


def test_features_beyond_the_memory_are_refused(examples, monkeypatch):
    monkeypatch.setattr(newton, "memory_of", lambda device: 2**16)
    with pytest.raises(ValueError, match=r"input must have features .* fit in memory, got 64, for"):
        newton.minimize(new_model(), *examples, WEIGHT_DECAY)


def test_half_precision_is_refused():
    model = new_model(torch.bfloat16)
    with pytest.raises(TypeError, match="model must have float32 or float64 parameters"):
        newton.minimize(model, torch.zeros(1, 64).bfloat16(), torch.tensor([0]), 0.1)


@pytest.mark.parametrize("target", [[], [newton.IGNORED]], ids=["none", "all ignored"])
def test_no_example_is_refused(target):
    input = torch.zeros(len(target), 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one example"):
        newton.minimize(new_model(), input, torch.tensor(target, dtype=torch.long), 0.1)
