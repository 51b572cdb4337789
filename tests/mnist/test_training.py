"""The loop: one update against the closed form, schedules, epochs and scores."""

import math

import pytest
import torch

from torch_softmax import SoftmaxRegression
from torch_softmax.mnist import training
from torch_softmax.mnist.settings import Settings
from torch_softmax.mnist.training import DivergenceError, Tally, batch_update, evaluate, train_epoch

FEATURES, CLASSES = 5, 3


@pytest.fixture
def model():
    return SoftmaxRegression(FEATURES, CLASSES, dtype=torch.float64)


@pytest.fixture
def batches():
    """Three batches, the last one smaller."""
    return [
        (torch.randn(size, FEATURES, dtype=torch.float64), torch.randint(CLASSES, (size,)))
        for size in (8, 8, 3)
    ]


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


# One update


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 7])
def test_batch_update_is_the_closed_form_by_hand(model, size, weight_decay):
    input = torch.randn(size, FEATURES, dtype=torch.float64)
    target = torch.randint(CLASSES, (size,))
    lr = 0.3

    w, b = (parameter.tolist() for parameter in model.parameters())
    step_w = [[weight_decay * w[k][d] for d in range(FEATURES)] for k in range(CLASSES)]
    step_b = [0.0] * CLASSES
    for x, label in zip(input.tolist(), target.tolist(), strict=True):
        z = [sum(w[k][d] * x[d] for d in range(FEATURES)) + b[k] for k in range(CLASSES)]
        total = sum(math.exp(z_k) for z_k in z)
        for k in range(CLASSES):
            difference = math.exp(z[k]) / total - (k == label)  # S(z) - y
            step_b[k] += difference / size
            for d in range(FEATURES):
                step_w[k][d] += x[d] * difference / size

    before_w, before_b = weights(model)
    batch_update(model, input, target, lr, weight_decay)
    after_w, after_b = weights(model)
    expected_w = before_w - lr * torch.tensor(step_w, dtype=torch.float64)
    expected_b = before_b - lr * torch.tensor(step_b, dtype=torch.float64)
    torch.testing.assert_close(after_w, expected_w, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(after_b, expected_b, rtol=1e-13, atol=1e-15)


def test_batch_update_returns_loss_and_classes_before_it_without_a_graph(model, batches):
    loss, predicted = model.loss(*batches[0]).detach(), model.predict(batches[0][0])
    update = batch_update(model, *batches[0], lr=1.0)
    assert torch.equal(update.loss, loss)
    assert torch.equal(update.predicted, predicted)
    assert not update.loss.requires_grad
    assert model.weight.grad is None


def test_batch_update_without_a_bias(batches):
    model = SoftmaxRegression(FEATURES, CLASSES, bias=False, dtype=torch.float64)
    before = batch_update(model, *batches[0], lr=0.01)
    assert model.loss(*batches[0]) < before.loss


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_batch_update_refuses(model, batches, name, value):
    before = weights(model)
    with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0, got"):
        batch_update(model, *batches[0], **{"lr": 0.1, name: value})
    assert all(map(torch.equal, weights(model), before))


# Settings


@pytest.mark.parametrize("epochs_done", [0, 1.5, 3.9])
def test_a_constant_learning_rate(epochs_done):
    assert Settings(epochs=4, lr=0.2, schedule="constant").learning_rate(epochs_done) == 0.2


@pytest.mark.parametrize(
    ("epochs_done", "factor"), [(0, 1), (1, 0.5 + math.sqrt(0.125)), (2, 0.5), (4, 0)]
)
def test_a_cosine_learning_rate(epochs_done, factor):
    settings = Settings(epochs=4, lr=0.2, schedule="cosine")
    assert settings.learning_rate(epochs_done) == pytest.approx(0.2 * factor, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("lr", 0.0, "a finite number above 0"),
        ("lr", -0.1, "a finite number above 0"),
        ("lr", math.nan, "a finite number above 0"),
        ("lr", math.inf, "a finite number above 0"),
        ("schedule", "linear", "'constant' or 'cosine'"),
        ("weight_decay", -1.0, "a finite number of at least 0"),
        ("seed", -1, r"from 0 to 2\*\*63 - 1"),
        ("seed", 2**63, r"from 0 to 2\*\*63 - 1"),
    ],
)
def test_settings_refuse(name, value, expected):
    with pytest.raises(ValueError, match=f"{name} must be {expected}, got {value!r}"):
        Settings(**{name: value})


# An epoch


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_epoch_is_one_update_after_another(model, batches, schedule):
    settings = Settings(epochs=4, lr=0.5, schedule=schedule, weight_decay=0.01)
    other = SoftmaxRegression(FEATURES, CLASSES, dtype=torch.float64)
    other.load_state_dict(model.state_dict())

    train_epoch(model, batches, settings, epoch=2)
    for step, batch in enumerate(batches):
        batch_update(other, *batch, settings.learning_rate(2 + step / 3), weight_decay=0.01)
    assert all(map(torch.equal, weights(model), weights(other)))


def test_an_epochs_score_is_of_each_batch_before_its_update(model, batches):
    losses, right = [], 0
    other = SoftmaxRegression(FEATURES, CLASSES, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    for input, target in batches:
        right += int((other.predict(input) == target).sum())
        losses += other.loss(input, target, reduction="none").tolist()
        batch_update(other, input, target, lr=0.5)

    score = train_epoch(model, batches, Settings(lr=0.5, schedule="constant"), epoch=0)
    assert score.loss == pytest.approx(sum(losses) / 19, rel=1e-12)
    assert score.accuracy == right / 19


def test_an_epoch_reports_up_to_its_end(model, batches, monkeypatch):
    monkeypatch.setattr(training, "REPORT_EVERY", 2)
    reports = []
    score = train_epoch(
        model,
        batches * 2,
        Settings(),
        epoch=0,
        report=lambda tally: reports.append((tally.batches, tally.score())),
    )
    assert [done for done, _ in reports] == [1, 3, 5, 6]
    assert reports[-1][1] == score


@pytest.mark.parametrize("first_part", [1, 2])
def test_an_epoch_in_two_parts_is_the_same_bit_for_bit(model, batches, first_part):
    settings = Settings(epochs=4, lr=0.5)
    whole = SoftmaxRegression(FEATURES, CLASSES, dtype=torch.float64)
    whole.load_state_dict(model.state_dict())
    expected = train_epoch(whole, batches, settings, epoch=2)

    tally = Tally()
    train_epoch(model, batches, settings, 2, tally, stop=lambda: tally.batches == first_part)
    assert tally.batches == first_part
    tally = tally.on_cpu()
    assert train_epoch(model, batches, settings, 2, tally) == expected
    assert all(map(torch.equal, weights(model), weights(whole)))


def test_a_tally_adds_up_the_seconds_of_all_parts(model, batches, monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 23.5])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    tally = Tally()
    for _ in range(2):
        train_epoch(model, batches, Settings(), 0, tally, stop=lambda: True)
    assert tally.seconds == 5.5


def test_an_epoch_that_is_done_can_not_go_on(model, batches):
    with pytest.raises(ValueError, match="tally must be of less than 3 batches, got 3"):
        train_epoch(model, batches, Settings(), 0, Tally(batches=3))


@pytest.mark.parametrize(("what", "batch_count"), [("the loss", 3), ("a weight", 1)])
def test_training_that_diverges_says_what_to_lower(batches, what, batch_count):
    model = SoftmaxRegression(FEATURES, CLASSES)
    batches = [(100 * input.float(), target) for input, target in batches[:batch_count]]
    message = rf"{what} is no longer a finite number: lower lr, which was 3e\+38"
    with pytest.raises(DivergenceError, match=message):
        train_epoch(model, batches, Settings(lr=3e38), epoch=0)


def test_evaluation_does_not_depend_on_the_batches(model, batches):
    input, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    score = evaluate(model, batches)
    assert score.loss == pytest.approx(model.loss(input, target).item(), rel=1e-14)
    assert score.accuracy == (model.predict(input) == target).sum() / 19
