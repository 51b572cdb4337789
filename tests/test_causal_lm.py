"""Models called without logits, by stand-ins for those of transformers: the loss, or an error."""

import dataclasses
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from tests.distributed.world import RankError, World, needs_fsdp_on_cpu
from tests.helpers import NewTensors, assert_same, errors
from torch_softmax.causal_lm import call_without_logits
from torch_softmax.functional import linear_cross_entropy

BATCH, LENGTH, WIDTH, CLASSES, CHUNK = 3, 11, 4, 37, 5


def ForCausalLMLoss(  # the name that transformers has for it
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None
):
    """The loss of all logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), shift_labels.flatten(), ignore_index=ignore_index, reduction="none"
    )
    count = (shift_labels != ignore_index).sum()
    return losses.sum() / (count if num_items_in_batch is None else num_items_in_batch)


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor | None


class Model(nn.Module):
    """A causal language model, which makes `changed` logits of those of its head."""

    loss_function = staticmethod(ForCausalLMLoss)

    def __init__(self, changed=lambda logits: logits, bias=False, dtype=torch.float64):
        super().__init__()
        self.changed = changed
        self.embedding = nn.Embedding(CLASSES, WIDTH, dtype=dtype)
        self.lm_head = nn.Linear(WIDTH, CLASSES, bias, dtype=dtype)

    def get_output_embeddings(self):
        return self.lm_head

    def hidden(self, input_ids):
        return self.embedding(input_ids).cumsum(1)

    def forward(self, input_ids, labels=None, **options):
        logits = self.changed(self.lm_head(self.hidden(input_ids)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, CLASSES, **options)
        return Output(loss, logits)


def tokens():
    """Token indices (B, T), and labels of which some are ignored."""
    ids = torch.randint(CLASSES, (BATCH, LENGTH))
    return ids, torch.where(torch.rand(ids.shape) < 0.3, -100, ids)


def without_logits(model, ids, labels, **options):
    return call_without_logits(model, input_ids=ids, labels=labels, chunk_size=CHUNK, **options)


def loss_and_gradients(model, loss):
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


def assert_as_dense(model, labels=None, **options):
    ids, some_labels = tokens()
    labels = some_labels if labels is None else labels
    ours = loss_and_gradients(model, without_logits(model, ids, labels, **options).loss)
    dense = loss_and_gradients(model, model(ids, labels, **options).loss)
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-12)


def refused(model, message, error=TypeError):
    with pytest.raises(error, match=message):
        without_logits(model, *tokens())


# The loss


def capped(cap, logits):
    return cap * torch.tanh(logits / cap)


CHANGES = {
    "nothing": lambda z: z,
    "a product": lambda z: z * 0.0625,
    "a product in place": lambda z: z.mul_(0.0625),
    "a quotient": lambda z: z / 3,
    "a cap": partial(capped, 2.0),
    "a cap of the scaled": lambda z: capped(2.0, z * 0.3),
    "a scale of the capped": lambda z: 0.3 * capped(2.0, z),
    "a negative scale of the capped": lambda z: -capped(2.0, z),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("scale", "cap"), [(1.0, None), (0.0625, None), (1.0, 30.0), (1.0, 7.0), (1.0, 0.1)]
)
def test_scale_and_cap_come_back_to_the_last_digit(scale, cap, dtype):
    model = Model(lambda z: z * scale if cap is None else capped(cap, z * scale), dtype=dtype)
    ids, labels = tokens()
    loss = linear_cross_entropy(
        model.hidden(ids),
        model.lm_head.weight,
        F.pad(labels, (0, 1), value=-100)[..., 1:],
        chunk_size=CHUNK,
        softcap=cap,
        logit_scale=scale,
    )
    ours = loss_and_gradients(model, without_logits(model, ids, labels).loss)
    torch.testing.assert_close(ours, loss_and_gradients(model, loss), rtol=0, atol=0)


every_cap = pytest.mark.parametrize(
    "changed", [CHANGES["nothing"], CHANGES["a cap"]], ids=["plain", "capped"]
)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES.keys())
def test_loss_and_gradients_are_those_of_all_logits(changed, bias):
    assert_as_dense(Model(changed, bias))


@pytest.mark.parametrize(
    "count",
    [17, 17.5, torch.tensor(17), torch.tensor(17.5)],
    ids=["int", "float", "ints", "floats"],
)
def test_a_number_of_items_takes_the_place_of_the_labels_that_count(count):
    assert_as_dense(Model(), num_items_in_batch=count)


def test_shifted_labels_are_not_shifted_again():
    assert_as_dense(Model(), shift_labels=tokens()[1])


def test_the_ignored_index_is_that_of_the_call():
    assert_as_dense(Model(), tokens()[0], ignore_index=3)


def test_micro_batches_add_up_to_the_batch():
    model, (ids, labels) = Model(), tokens()
    count = (labels[:, 1:] != -100).sum()
    whole = loss_and_gradients(model, without_logits(model, ids, labels).loss)
    parts = [
        loss_and_gradients(model, without_logits(model, i, t, num_items_in_batch=count).loss)
        for i, t in zip(ids.split(2), labels.split(2), strict=True)
    ]
    for expected, *of_parts in zip(whole, *parts, strict=True):
        assert_same(sum(of_parts), expected)


def test_labels_that_are_all_ignored_add_nothing_to_a_count():
    model, (ids, labels) = Model(), tokens()
    loss = without_logits(model, ids, labels.fill_(-100), num_items_in_batch=5).loss
    assert all(not value.any() for value in loss_and_gradients(model, loss))


@every_cap
def test_a_z_loss_adds_the_square_of_the_normaliser(changed):
    model, (ids, labels) = Model(changed), tokens()
    output = model(ids, labels)
    kept = labels[:, 1:] != -100
    penalty = output.logits[:, :-1].logsumexp(-1)[kept].square().mean()
    expected = loss_and_gradients(model, output.loss + 0.1 * penalty)
    ours = loss_and_gradients(model, without_logits(model, ids, labels, z_loss=0.1).loss)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_a_tied_embedding_gets_both_of_its_gradients():
    model = Model()
    model.lm_head.weight = model.embedding.weight
    assert len(list(model.parameters())) == 1
    assert_as_dense(model)


class Called(nn.Module):
    """The loss of a model that is called in some way."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, ids, labels):
        return self.call(self.model, ids, labels).loss


def dense(model, ids, labels):
    return model(ids, labels)


@every_cap
def test_half_precision_is_no_further_from_the_exact_loss_than_all_logits_are(changed):
    ids, labels = tokens()
    names = [name for name, _ in Called(Model(), dense).named_parameters()]

    def called(call):
        def loss(*weights):
            module = Called(Model(changed, dtype=weights[0].dtype), call)
            loss = functional_call(module, dict(zip(names, weights, strict=True)), (ids, labels))
            assert loss.dtype == torch.promote_types(weights[0].dtype, torch.float32)
            return loss

        return loss

    def draw():
        return [p.detach().bfloat16().requires_grad_() for p in Model().parameters()]

    ours, theirs = (errors(called(c), called(dense), draw) for c in (without_logits, dense))
    assert (ours <= 1.05 * theirs).all()


def test_autocast_gives_the_loss_in_float32():
    model, (ids, labels) = Model(dtype=torch.float32), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = without_logits(model, ids, labels).loss
    torch.testing.assert_close(loss, model(ids, labels).loss, rtol=1e-2, atol=0)


def test_nothing_is_as_large_as_the_logits_of_all_rows():
    model, (ids, labels) = Model(CHANGES["a cap"]), tokens()
    with NewTensors() as new:
        without_logits(model, ids, labels).loss.backward()
    assert max(new.sizes) == CHUNK * CLASSES


@every_cap
@pytest.mark.parametrize("count", [None, torch.tensor(5)], ids=["no count", "count"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_nothing_waits_for_the_device_of_a_model(device, count, changed):
    model, (ids, labels) = Model(changed).to("meta"), tokens()  # which has no number to wait for
    inputs = {"labels": labels.to(device), "num_items_in_batch": count}
    without_logits(model, ids.to("meta"), **inputs).loss.backward()
    assert model.lm_head.weight.grad.is_meta


def test_under_no_grad_the_loss_is_the_same():
    model, (ids, labels) = Model(), tokens()
    with torch.no_grad():
        loss = without_logits(model, ids, labels).loss
    assert_same(loss, model(ids, labels).loss.detach())


# The call


def test_the_output_has_no_logits():
    assert without_logits(Model(), *tokens()).logits is None


class Penalised(Model):
    """Adds to its loss."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        penalty = self.embedding.weight.square().sum()
        return dataclasses.replace(output, loss=output.loss + penalty)


def test_what_a_model_adds_to_its_loss_is_kept():
    assert_as_dense(Penalised())


def test_what_a_model_adds_to_the_mean_of_no_labels_is_nan():
    ids, labels = tokens()
    assert without_logits(Penalised(), ids, labels.fill_(-100)).loss.isnan()


class Forwarding(nn.Module):
    """Has all that is in it as attributes of its own, as PEFT's wrappers do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


@pytest.mark.parametrize("wrapper", [nn.Sequential, Forwarding, partial(Called, call=None)])
def test_a_model_is_found_in_what_wraps_it(wrapper):
    model, (ids, labels) = Model(), tokens()
    wrapped = wrapper(model)
    wrapped.forward = lambda **inputs: model(**inputs)
    assert_same(without_logits(wrapped, ids, labels).loss, model(ids, labels).loss)


@pytest.mark.parametrize("label", [3, CLASSES], ids=["after a call", "after an error"])
def test_a_model_is_as_it_was(label):
    model, (ids, labels) = Model(), tokens()
    before = model(ids, labels)
    changed = labels.clone()
    changed[0, -1] = label
    with suppress(ValueError):
        without_logits(model, ids, changed)
    after = model(ids, labels)
    assert_same((after.loss, after.logits), (before.loss, before.logits))
    assert "forward" not in vars(model.lm_head)


def test_a_label_out_of_range_is_refused():
    ids, labels = tokens()
    labels[0, -1] = CLASSES
    with pytest.raises(ValueError, match=r"target must hold class indices in \[0, 37\)"):
        without_logits(Model(), ids, labels)


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    ids, labels = tokens()
    with pytest.raises(IndexError, match="out of range"):
        without_logits(Model(), ids + CLASSES, labels)


@pytest.mark.parametrize("labels", [None, [1]])
def test_labels_must_be_a_tensor(labels):
    with pytest.raises(TypeError, match="labels must be a tensor, got "):
        without_logits(Model(), tokens()[0], labels)


# Ranks


def wrapped(mesh, wrapper, model):
    """A model whose gradients are averaged over ranks, by one of two ways of torch."""
    if wrapper == "sharded":
        fully_shard(model.embedding, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model)


def averaged_gradients(mesh, wrapper, call):
    """The gradients of a model for other rows on each rank."""
    torch.manual_seed(0)
    model = Model(partial(capped, 2.0))
    torch.manual_seed(mesh.get_rank())
    averaged = wrapped(mesh, wrapper, model)
    call(averaged, *tokens()).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]


def call_with_a_sharded_head(mesh):
    model = Model()
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    without_logits(model, *tokens())


@pytest.fixture(scope="module")
def world():
    with World(2) as world:
        yield world


@pytest.mark.parametrize(
    "wrapper", ["replicated", pytest.param("sharded", marks=needs_fsdp_on_cpu)]
)
def test_gradients_are_averaged_over_ranks(wrapper, world):
    ours, others = world.run(averaged_gradients, wrapper, without_logits)
    expected, _ = world.run(averaged_gradients, wrapper, dense)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(others, ours, rtol=0, atol=0)


def test_a_head_that_is_sharded_by_itself_is_refused(world):
    with pytest.raises(RankError, match=r"the output head of model must .* got FSDPLinear"):
        world.run(call_with_a_sharded_head)


# Heads that are more than a weight and a bias


class Adapted(nn.Linear):
    """As an adapter does it, or a quantised layer: another class."""


def with_head(change):
    """A model whose head is changed by a function, or exchanged for what that returns."""
    model = Model()
    returned = change(model.lm_head)
    if isinstance(returned, nn.Module):
        model.lm_head = returned
    return model


class Quantised(torch.Tensor):
    """Numbers that are kept in another form."""


def quantise(head):
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Quantised))


def replace_forward(head):
    head.forward = head.forward


HEADS = {
    "a subclass": (lambda head: Adapted(WIDTH, CLASSES), "got Adapted"),
    "more layers": (lambda head: nn.Sequential(head), "got Sequential"),
    "a parametrization": (parametrizations.weight_norm, "got ParametrizedLinear"),
    "a hook": (lambda h: h.register_forward_hook(lambda *_: None), "got one with hooks"),
    "a pre-hook": (lambda h: h.register_forward_pre_hook(lambda *_: None), "got one with hooks"),
    "a backward hook": (
        lambda h: h.register_full_backward_hook(lambda *_: None),
        "got one with hooks",
    ),
    "a backward pre-hook": (
        lambda h: h.register_full_backward_pre_hook(lambda *_: None),
        "got one with hooks",
    ),
    "a forward": (replace_forward, "got one with a forward of its own"),
    "a quantised weight": (quantise, "a plain tensor as its weight, got Quantised"),
}


@pytest.mark.parametrize(("change", "message"), HEADS.values(), ids=HEADS.keys())
def test_a_head_that_is_more_than_a_linear_layer_is_refused(change, message):
    refused(with_head(change), f"the output head of model must .*{message}")


def test_a_model_without_a_head_is_refused():
    model = Model()
    model.get_output_embeddings = lambda: None
    refused(model, "the output head of model must be a plain nn.Linear, .* got NoneType")


# Models that do with their logits what is not known


def masked(logits):
    logits = logits.clone()
    logits[..., 5] = -1e9
    return logits


class Temperature(nn.Module):
    """A number to be learnt, which is 1 at first."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, logits):
        return logits * self.value


UNKNOWN = {
    "a bias": lambda z: z + 0.01,
    "a bias of a class": lambda z: z + 1e-3 * (torch.arange(CLASSES) == 5),
    "a mask": masked,
    "a floor": lambda z: z.clamp(min=-50),
    "another function": lambda z: z.sign() * z.abs().sqrt(),
    "a cap of another kind": lambda z: z / (1 + z.abs() / 5),
    "a learnt temperature": Temperature(),
    "fewer classes": lambda z: z[..., :30],
    "half precision": lambda z: z.bfloat16(),
    "log-probabilities": lambda z: z.log_softmax(-1),
    "nan": lambda z: z * float("nan"),
}


@pytest.mark.parametrize("changed", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_logits_that_are_more_than_scaled_and_capped_are_refused(changed):
    refused(Model(changed), "model must do nothing to its logits but scale them and cap them by")


def test_a_single_class_tells_no_scale_and_is_refused():
    model = with_head(lambda head: nn.Linear(WIDTH, 1))
    refused(model, "model must do nothing to its logits but")


class Beside(Model):
    """Uses its logits beside the loss."""

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        return dataclasses.replace(output, loss=output.loss + output.logits.logsumexp(-1).mean())


class Twice(Model):
    def forward(self, input_ids, **options):
        self.lm_head(self.hidden(input_ids))
        return super().forward(input_ids, **options)


class TwiceWithTheLossBetween(Model):
    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        further = self.lm_head(self.hidden(input_ids)).logsumexp(-1).mean()
        return dataclasses.replace(output, loss=output.loss + further)


class WithItsOwnLoss(Model):
    def forward(self, input_ids, labels):
        logits = self.lm_head(self.hidden(input_ids))
        return Output(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


class WithoutLoss(Model):
    def forward(self, input_ids, labels):
        return Output(None, self.lm_head(self.hidden(input_ids)))


class WithoutHead(Model):
    def forward(self, input_ids, labels):
        logits = F.linear(self.hidden(input_ids), self.lm_head.weight)
        return Output(self.loss_function(logits, labels, CLASSES), logits)


class WithTwoLosses(Model):
    def forward(self, input_ids, labels):
        logits = self.lm_head(self.hidden(input_ids))
        losses = [self.loss_function(logits, labels, CLASSES) for _ in range(2)]
        return Output(sum(losses), logits)


class WithTuple(Model):
    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        return output.loss, output.logits


def another_loss(logits, labels, vocab_size):
    return logits.sum()


class WithAnotherLoss(Model):
    loss_function = staticmethod(another_loss)


MODELS = {
    Beside: "model must use its logits for its loss_function alone",
    Twice: "model must call its output head once, got a second call",
    TwiceWithTheLossBetween: "model must call its output head once, got a second call",
    WithItsOwnLoss: "WithItsOwnLoss does something else with them first: Expected input batch_size",
    WithoutLoss: "model must call its output head, and then its loss_function, once",
    WithoutHead: "model must call its output head, and then its loss_function, once",
    WithTwoLosses: "model must call its output head, and then its loss_function, once",
    WithTuple: "model must return its output by name, got tuple",
    WithAnotherLoss: "model must have ForCausalLMLoss as its loss_function, got <function another",
    partial(nn.Linear, 2, 2): "model must be a causal language model of transformers, .* Linear",
    lambda: nn.DataParallel(Model()): "model must not be replicated by DataParallel",
    lambda: torch.compile(Model()): "model must not be compiled as a whole",
}


@pytest.mark.parametrize(("model", "message"), MODELS.items(), ids=range(len(MODELS)))
def test_a_model_that_would_get_another_loss_is_refused(model, message):
    refused(model(), message)


def test_a_model_that_was_compiled_in_place_is_refused():
    model = Model()
    model.compile()
    refused(model, "model must not be compiled as a whole")


def test_a_model_of_a_single_token_with_its_own_loss_is_refused():
    ids = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(TypeError, match="model must call its output head, and then"):
        without_logits(WithItsOwnLoss(), ids, ids)
