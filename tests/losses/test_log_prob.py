"""Log-probability and entropy of a layer's labels, against torch's dense functions."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import assert_differentiable, assert_same, randn
from torch_softmax.functional import LogProb, linear_log_prob

N, D = 7, 3
CHANGES = [{}, {"softcap": 2.0, "logit_scale": 0.5}]

every_size = pytest.mark.parametrize("classes", [1, 5, 40])
every_change = pytest.mark.parametrize("options", CHANGES, ids=["", "capped"])


def written_out(x, W, target, b=None, softcap=None, logit_scale=1.0, ignore_index=-100):
    z = F.linear(x, W, b) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_S = z.log_softmax(-1)
    keep = target != ignore_index
    label = torch.where(keep, target, 0).unsqueeze(-1)
    entropy = -torch.special.xlogy(log_S.exp(), log_S.exp()).sum(-1)
    every = (
        log_S.gather(-1, label).squeeze(-1),
        entropy,
        z.logsumexp(-1),
        z.argmax(-1) == label.squeeze(-1),
    )
    return LogProb(*(torch.where(keep, value, torch.zeros_like(value)) for value in every))


def problem(classes, *shape):
    shape = shape or (N,)
    target = torch.randint(classes, shape)
    target.view(-1)[0] = -100
    return randn(*shape, D), randn(classes, D), randn(classes), target


def in_chunks(target, **options):
    """The three that have derivatives, as a function of x, W and b."""

    def applied(x, W, b):
        return linear_log_prob(x, W, target, linear_bias=b, chunk_size=3, **options)[:3]

    return applied


@every_change
@every_size
@pytest.mark.parametrize("shape", [(), (N,), (2, 3), (0,)], ids=str)
def test_values_are_those_of_all_logits(shape, classes, options):
    x, W, b = randn(*shape, D), randn(classes, D), randn(classes)
    target = torch.randint(classes, shape)
    actual = linear_log_prob(x, W, target, linear_bias=b, chunk_size=3, **options)
    assert_same(actual, written_out(x, W, target, b, **options))


@every_change
@every_size
@pytest.mark.parametrize("index", range(3), ids=LogProb._fields[:3])
def test_gradients_of_each_alone(index, classes, options):
    x, W, b, target = problem(classes)
    upstream = torch.randn(N, dtype=torch.float64)
    results = (
        linear_log_prob(x, W, target, linear_bias=b, chunk_size=3, **options),
        written_out(x, W, target, b, **options),
    )
    assert_same(*(torch.autograd.grad(r[index], (x, W, b), upstream) for r in results))


@every_change
def test_gradients_of_all_together(options):
    x, W, b, target = problem(40)
    results = (
        linear_log_prob(x, W, target, linear_bias=b, chunk_size=3, **options),
        written_out(x, W, target, b, **options),
    )
    upstream = [torch.randn(N, dtype=torch.float64) for _ in range(3)]
    assert_same(*(torch.autograd.grad(r[:3], (x, W, b), upstream) for r in results))


@every_change
def test_derivatives_to_second_order_in_either_mode(options):
    x, W, b, target = problem(5, 4)
    assert_differentiable(in_chunks(target, **options), x, W, b, fast_mode=True)


@pytest.mark.parametrize("frozen", range(3), ids=["x", "W", "b"])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = list(problem(5)[:3])
    tensors[frozen] = tensors[frozen].detach()
    target = torch.arange(N) % 5
    sum(r.sum() for r in in_chunks(target)(*tensors)).backward()
    assert [t.grad is None for t in tensors] == [i == frozen for i in range(3)]


def test_the_hessian_by_func():
    x, W, _, target = (t.detach() for t in problem(5))

    def hessian(function):
        def policy_loss(W):
            log_prob, entropy, _, _ = function(x, W, target)
            return (log_prob.exp() + 0.1 * entropy).sum()

        return torch.func.hessian(policy_loss)(W)

    assert_same(hessian(linear_log_prob), hessian(written_out))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole():
    x, W, b, target = problem(40)
    compiled = torch.compile(in_chunks(target), backend="aot_eager", fullgraph=True)
    results = [function(x, W, b) for function in (compiled, in_chunks(target))]
    assert_same(*results)
    assert_same(*(torch.autograd.grad(sum(map(torch.sum, r)), (x, W, b)) for r in results))


def test_an_ignored_row_has_nothing_whatever_it_holds():
    x, W, _, target = problem(5)
    with torch.no_grad():
        x[0] = math.nan
    of = linear_log_prob(x, W, target)
    assert [value[0].item() for value in of] == [0, 0, 0, False]
    by_x, by_W = torch.autograd.grad(sum(value.sum() for value in of[:3]), (x, W))
    assert not by_x[0].any()
    assert by_W.isfinite().all()


@pytest.mark.parametrize("reached", [1.0, 4000.0, -math.inf])
def test_logits_far_apart(reached):
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    W = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([reached, 0.0], dtype=torch.float64, requires_grad=True)
    of = linear_log_prob(x, W, torch.tensor([1]), linear_bias=b)
    expected = written_out(x, W, torch.tensor([1]), b)
    assert_same(of, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(of[:3]), (x, W, b)))


def test_a_label_of_a_row_of_nan_is_not_correct():
    of = linear_log_prob(torch.full((3, D), math.nan), torch.zeros(3, D), torch.arange(3))
    assert of.correct.tolist() == [False, False, False]


def test_ties_are_correct_for_the_first_class_alone():
    of = linear_log_prob(torch.zeros(3, D), torch.zeros(3, D), torch.arange(3))
    assert of.correct.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_as_float32_and_nearer_than_dense(dtype):
    x, W, _, target = problem(40)
    x, W = (t.detach().to(dtype) for t in (x, W))
    exact = written_out(x.double(), W.double(), target)
    ours, dense = linear_log_prob(x, W, target), written_out(x, W, target)
    for name in LogProb._fields[:3]:
        assert getattr(ours, name).dtype == torch.float32
        errors = [(getattr(of, name) - getattr(exact, name)).abs().max() for of in (ours, dense)]
        assert errors[0] < 0.1 * errors[1]


def test_a_wider_dtype_that_is_asked_for():
    x, W, _, target = problem(40)
    x, W = x.detach().float(), W.detach().float()
    wide = linear_log_prob(x, W, target, dtype=torch.float64)
    assert_same(wide, written_out(x.double(), W.double(), target))


def test_an_entropy_that_is_not_asked_for_is_nan():
    x, W, b = problem(5)[:3]
    target = torch.arange(N) % 5
    alone = linear_log_prob(x, W, target, linear_bias=b, entropy=False)
    assert alone.entropy.isnan().all()
    expected = written_out(x, W, target, b)
    assert_same(alone._replace(entropy=alone.log_prob), expected._replace(entropy=expected[0]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.zeros(N)}, TypeError, "target must have an integer dtype for class ind"),
        ({"target": torch.zeros(N - 1).long()}, ValueError, "target must have shape"),
        ({"target": torch.full((N,), 5)}, ValueError, "target must hold class indices in"),
        ({"linear_weight": torch.zeros(5, 2, D)}, ValueError, "linear_weight must have the shape"),
        ({"linear_weight": torch.zeros(0, D)}, ValueError, "linear_weight must have the shape"),
        ({"input": torch.zeros(N, D + 1)}, ValueError, "input must have a last dimension of 3"),
        ({"linear_bias": torch.zeros(4)}, ValueError, "linear_bias must have shape"),
        ({"softcap": -1.0}, ValueError, "softcap must "),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
    ],
)
def test_an_unfit_argument_is_named(changes, error, message):
    fit = {
        "input": torch.zeros(N, D),
        "linear_weight": torch.zeros(5, D),
        "target": torch.zeros(N).long(),
    }
    with pytest.raises(error, match=f"^{message}"):
        linear_log_prob(**{**fit, **changes})
