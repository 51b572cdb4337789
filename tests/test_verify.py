"""The audit tells right Functions from broken ones, and says what is broken."""

import functools

import pytest
import torch
from torch.autograd import Function
from torch.nn import functional as F

from tests import reference
from tests.helpers import ON_TORCH_2_6, randn, random_target
from torch_softmax.functional import cross_entropy, linear_cross_entropy
from torch_softmax.verify import audit

CLAIMS = [
    "value",
    "inputs unchanged",
    "backward",
    "second backward",
    "double backward",
    "forward mode",
    "forward over reverse",
    "under no_grad",
    "forward over backward",
    "vmap of grad",
]


class Right(Function):
    """The loss of each row, by the book."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, y):
        return -(y * torch.log_softmax(z, 1)).sum(1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        z, y = ctx.saved_tensors
        return upstream.unsqueeze(1) * (torch.softmax(z, 1) - y), None

    @staticmethod
    def jvp(ctx, dz, dy):
        z, y = ctx.saved_tensors
        return ((torch.softmax(z, 1) - y) * dz).sum(1)


class WrongBackward(Right):
    @staticmethod
    def backward(ctx, upstream):
        z, _ = ctx.saved_tensors
        return upstream.unsqueeze(1) * torch.softmax(z, 1), None


class ReusesSavedGradient(Right):
    @staticmethod
    def setup_context(ctx, inputs, output):
        Right.setup_context(ctx, inputs, output)
        z, y = inputs
        ctx.gradient = (torch.softmax(z, 1) - y).detach()

    @staticmethod
    def backward(ctx, upstream):
        return upstream.unsqueeze(1) * ctx.gradient, None


class WritesIntoItsInput(Right):
    @staticmethod
    def forward(z, y):
        z -= z.amax(1, keepdim=True)
        return Right.forward(z, y)


class WritesIntoItsInputInBackward(Right):
    @staticmethod
    def backward(ctx, upstream):
        gradients = Right.backward(ctx, upstream)
        ctx.saved_tensors[0].data.add_(1)  # not seen by autograd, nor is a kernel's own write
        return gradients


class ScalesSavedGradientInPlace(ReusesSavedGradient):
    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            return Right.backward(ctx, upstream)
        return ctx.gradient.mul_(upstream.unsqueeze(1)), None


class GivesSavedGradientAway(ReusesSavedGradient):
    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            return Right.backward(ctx, upstream)
        gradient, ctx.gradient = ctx.gradient, None
        return gradient * upstream.unsqueeze(1), None


class WithoutVmap(Right):
    generate_vmap_rule = False


class WithoutForwardMode(Right):
    jvp = Function.jvp


class WrongForwardMode(Right):
    @staticmethod
    def jvp(ctx, dz, dy):
        z, _ = ctx.saved_tensors
        return (torch.softmax(z, 1) * dz).sum(1)


# Second order contains first order, so some are wrong in several claims.
WRONG = "SILENTLY WRONG"
BACKWARD = ["backward", "double backward"]
SECOND_ORDER = [
    "double backward",
    "forward over reverse",
    "under no_grad",
    "forward over backward",
]
FORWARD = ["forward mode", "forward over reverse", "under no_grad", "forward over backward"]
BROKEN = [
    (WrongBackward, dict.fromkeys(BACKWARD, WRONG)),
    (ReusesSavedGradient, dict.fromkeys(SECOND_ORDER, WRONG)),
    (
        WritesIntoItsInput,
        dict.fromkeys(["inputs unchanged", "forward over backward"], WRONG)
        # Which refuses to write into a view that was made under no_grad.
        | ({"under no_grad": "raises"} if ON_TORCH_2_6 else {}),
    ),
    (
        ScalesSavedGradientInPlace,
        dict.fromkeys(["second backward", "forward over backward"], WRONG),
    ),
    (GivesSavedGradientAway, {"second backward": "raises", "forward over backward": WRONG}),
    (WithoutVmap, {"vmap of grad": "raises"}),
    (WithoutForwardMode, dict.fromkeys(FORWARD, "raises")),
    (WrongForwardMode, dict.fromkeys(FORWARD, WRONG)),
]


every_broken = pytest.mark.parametrize(("broken", "outcomes"), BROKEN)


def plain(z, y):
    return -(y * torch.log_softmax(z, 1)).sum(1)


def problem(dtype=torch.float64):
    return [randn(3, 4, dtype=dtype), F.one_hot(torch.tensor([2, 0, 1]), 4).to(dtype)]


def failures(report):
    return {row.name: row.outcome for row in report.rows if row.outcome != "ok"}


@every_broken
def test_broken_function_is_caught_by_name(broken, outcomes):
    assert failures(audit(broken.apply, problem())) == outcomes


@every_broken
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_function_is_caught_against_a_reference(broken, outcomes, dtype):
    report = audit(broken.apply, problem(dtype), plain)
    assert failures(report).items() >= outcomes.items()


def test_a_backward_that_writes_into_an_input_is_caught():
    report = audit(WritesIntoItsInputInBackward.apply, problem())
    assert report["inputs unchanged"].outcome == "SILENTLY WRONG"


def test_right_function_passes_by_differences():
    assert audit(Right.apply, problem()).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_right_function_passes_against_a_reference(dtype):
    assert failures(audit(Right.apply, problem(dtype), plain)) == {}


def our_losses(name, kind, dtype=torch.float64, **options):
    """One of our losses with inputs, and the oracle for it."""
    target = random_target(kind, (3,), 4)
    loss, naive, inputs = {
        "cross_entropy": (cross_entropy, reference.cross_entropy, [randn(3, 4, dtype=dtype)]),
        "linear_cross_entropy": (
            functools.partial(linear_cross_entropy, chunk_size=2),
            reference.linear_cross_entropy,
            [randn(3, 2, dtype=dtype), randn(4, 2, dtype=dtype)],
        ),
    }[name]
    return (
        functools.partial(loss, **options),
        [*inputs, target],
        functools.partial(naive, **options),
    )


every_kind = pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
every_name = pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])


@pytest.mark.parametrize("against_reference", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_kind
@every_name
def test_our_losses_pass(name, kind, reduction, against_reference):
    loss, inputs, naive = our_losses(name, kind, reduction=reduction)
    assert failures(audit(loss, inputs, naive if against_reference else None)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_kind
@every_name
def test_our_losses_pass_in_other_dtypes(name, kind, dtype):
    assert failures(audit(*our_losses(name, kind, dtype))) == {}


@every_name
@pytest.mark.usefixtures("fresh_compiler")
def test_our_losses_pass_compiled(name):
    report = audit(*our_losses(name, "ignored"), compiled=True)
    assert failures(report) == {}
    assert [row.name for row in report.rows][-3:] == [
        "compiled twice backward",
        "compiled hvp (eager)",
        "compiled hvp (aot_eager)",
    ]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_that_drops_a_second_derivative_is_caught():
    def held(z, y):
        return plain(z, y) + 0 * z.sum(1) if torch.compiler.is_compiling() else plain(z, y)

    def dropped(z, y):
        return plain(z.detach(), y) + 0 * z.sum(1) if torch.compiler.is_compiling() else plain(z, y)

    assert audit(held, problem(), plain, compiled=True).ok
    assert (
        failures(audit(dropped, problem(), plain, compiled=True)).items()
        >= {
            "compiled hvp (eager)": WRONG,
            "compiled hvp (aot_eager)": WRONG,
        }.items()
    )


def test_a_wrong_value_is_told_from_a_wrong_gradient():
    report = audit(lambda z, y: plain(z, y) + 1, problem(), plain)
    assert report["value"].outcome == "SILENTLY WRONG"


def test_a_gradient_of_nan_is_wrong():
    report = audit(lambda z, y: plain(z, y) + (0 * z).sqrt().sum(1), problem())
    assert report["backward"].outcome == "SILENTLY WRONG"


def test_a_gradient_that_is_left_out_is_wrong():
    report = audit(lambda z, y: plain(z.detach(), y) + 0 * z.sum(1), problem())
    assert report["backward"].error == pytest.approx(1)


def test_rows_are_the_claims():
    assert [row.name for row in audit(plain, problem(), plain).rows] == CLAIMS


def test_repr_is_a_line_a_claim():
    lines = repr(audit(WithoutVmap.apply, problem())).splitlines()
    assert [line[:26].rstrip() for line in lines] == CLAIMS[1:]
    assert lines[-1].split()[3:5] == ["raises", "RuntimeError:"]


def test_the_callers_tensors_and_random_state_stay():
    z, y = problem()
    before, state = z.detach().clone(), torch.get_rng_state()
    audit(WritesIntoItsInput.apply, [z, y])
    assert torch.equal(z, before)
    assert z.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fn", "inputs", "error", "message"),
    [
        (plain, [randn(3, 4), 2], TypeError, "inputs must be tensors, got int"),
        (plain, [torch.zeros(3, 4)], ValueError, "requires a gradient, got none"),
        (plain, problem(torch.float32), ValueError, "inputs must be float64 .* got torch.float32"),
        (lambda z: (z, z), [randn(3)], TypeError, "fn must return a tensor, got tuple"),
    ],
)
def test_bad_argument_is_named(fn, inputs, error, message):
    with pytest.raises(error, match=message):
        audit(fn, inputs)


def test_reference_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"reference must return the shape \(3,\) .* got \(\)"):
        audit(plain, problem(), lambda z, y: plain(z, y).sum())
