"""The modules on several ranks: sharded in one line, saved and loaded, and inside DDP and FSDP."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.world import World, needs_fsdp_on_cpu
from torch_softmax import LinearCrossEntropyLoss, SoftmaxRegression
from torch_softmax.distributed.class_parallel import ClassParallel
from torch_softmax.mnist.training import batch_update, evaluate

ROWS, FEATURES, CLASSES = 6, 4, 7
STEPS = 3


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{}ranks".format)
def world(request):
    with World(request.param) as world:
        yield world


@pytest.fixture(scope="module")
def three():
    with World(3) as world:
        yield world


class Model(nn.Module):
    """A body and a head, which gives the loss."""

    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES)
        self.head = LinearCrossEntropyLoss(FEATURES, CLASSES, bias=bias)

    def forward(self, input, target):
        return self.head(self.body(input).tanh(), target)


class Classifier(nn.Module):
    """Softmax regression that gives the loss, as the wrappers want it."""

    def __init__(self):
        super().__init__()
        self.head = SoftmaxRegression(FEATURES, CLASSES)

    def forward(self, input, target):
        return self.head.loss(input, target)


MODELS = {"body and head": Model, "softmax regression": Classifier}
PLAN = {"head": ClassParallel()}
every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def make_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return input, torch.randint(CLASSES, (ROWS,), generator=generator)


def full(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def trained(model, input, target):
    """The losses of some steps, and the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input, target)
        loss.backward()
        optimizer.step()
        losses.append(full(loss).item())
    return losses, [full(p).detach().clone() for p in model.parameters()]


def assert_trained_alike(results, name, *, losses=True):
    expected_losses, expected = trained(make(name), *make_batch())
    for of_rank, parameters in results:
        if losses:
            assert of_rank == pytest.approx(expected_losses, rel=1e-12)
        for parameter, right in zip(parameters, expected, strict=True):
            rounding = 1e-6 if parameter.dtype == torch.float32 else 1e-12
            torch.testing.assert_close(parameter.double(), right, rtol=0, atol=rounding)


def shard_and_train(mesh, name):
    model = parallelize_module(make(name), mesh, PLAN)
    head = model.head.linear if name == "body and head" else model.head
    assert all(isinstance(p, DTensor) for p in head.parameters())
    assert head.weight.to_local().shape[0] <= -(-CLASSES // mesh.size())
    return trained(model, *make_batch())


@every_model
def test_a_model_with_sharded_classes_trains_as_in_one_process(world, name):
    assert_trained_alike(world.run(shard_and_train, name), name)


def shard_and_predict(mesh):
    torch.manual_seed(0)
    model = parallelize_module(SoftmaxRegression(FEATURES, CLASSES), mesh, ClassParallel())
    input = make_batch()[0].float()
    with torch.no_grad():
        return model(input), model.predict_proba(input), model.predict(input)


def test_a_sharded_classifier_predicts_as_in_one_process(world):
    torch.manual_seed(0)
    model = SoftmaxRegression(FEATURES, CLASSES)
    input = make_batch()[0].float()
    expected = model(input), model.predict_proba(input), model.predict(input)
    for results in world.run(shard_and_predict):
        for result, right in zip(results, expected, strict=True):
            assert type(result) is torch.Tensor
            torch.testing.assert_close(result, right.detach())


def gradients_by_logits(model, input, target):
    input = input.requires_grad_()
    loss = F.cross_entropy(model(input), target)
    return [full(g) for g in torch.autograd.grad(loss, [input, *model.parameters()])]


def make_classifier():
    torch.manual_seed(0)
    return SoftmaxRegression(FEATURES, CLASSES, dtype=torch.float64)


def shard_and_differentiate_logits(mesh):
    model = parallelize_module(make_classifier(), mesh, ClassParallel())
    return gradients_by_logits(model, *make_batch())


def test_gradients_through_the_gathered_logits(world):
    expected = gradients_by_logits(make_classifier(), *make_batch())
    for results in world.run(shard_and_differentiate_logits):
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result, right, rtol=0, atol=1e-12)


def updated(model):
    """The scores before and after two updates in closed form, and the parameters then."""
    input, target = make_batch()
    scores = [evaluate(model, [(input, target)])]
    for _ in range(2):
        batch_update(model, input, target, lr=0.5, weight_decay=0.1)
    scores.append(evaluate(model, [(input, target)]))
    return scores, [full(p).detach() for p in model.parameters()]


def shard_and_update(mesh):
    return updated(parallelize_module(make_classifier(), mesh, ClassParallel()))


def test_updates_in_closed_form_and_scores_are_those_of_one_process(world):
    scores, parameters = updated(make_classifier())
    for of_rank, results in world.run(shard_and_update):
        for score, right in zip(of_rank, scores, strict=True):
            assert score == pytest.approx(right, rel=1e-12)
        for result, right in zip(results, parameters, strict=True):
            torch.testing.assert_close(result, right, rtol=0, atol=1e-12)


class Embedding(nn.Embedding):
    """No linear layer."""


@pytest.mark.parametrize("module", [Embedding(3, 2), nn.ReLU()], ids=["embedding", "relu"])
def test_what_is_no_linear_layer_is_refused(two, module):
    for message in two.run(refusal_of, module):
        name = type(module).__name__
        assert message.startswith("module must be a linear layer")
        assert message.endswith(f"got {name}")


def refusal_of(mesh, module):
    with pytest.raises(TypeError) as raised:
        parallelize_module(module, mesh, ClassParallel())
    return str(raised.value)


def refusals_of_other_arrangements(mesh):
    grid = init_device_mesh("cpu", (1, mesh.size()))
    head = LinearCrossEntropyLoss(FEATURES, CLASSES, out_features=(2,))
    messages = []
    for module, on in ((SoftmaxRegression(FEATURES, CLASSES), grid), (head, mesh)):
        with pytest.raises(ValueError, match="must") as raised:
            ClassParallel()._apply(module, on)
        messages.append(str(raised.value))
    return messages


def test_a_mesh_of_two_dimensions_and_more_losses_a_row_are_refused(two):
    for of_mesh, of_module in two.run(refusals_of_other_arrangements):
        assert of_mesh.startswith("device_mesh must be of one dimension, got 2")
        assert of_module.startswith("module must have one loss for each input")


# Checkpoints


def save(mesh, path):
    model = parallelize_module(make("body and head"), mesh, PLAN)
    dcp.save(get_model_state_dict(model), checkpoint_id=path)


def load(mesh, path):
    torch.manual_seed(5)  # other weights than those to load
    model = parallelize_module(Model().double(), mesh, PLAN)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state)
    return [full(p).detach() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sharded_head_is_saved_by_two_ranks_and_loaded_by_three_or_one(two, three, tmp_path):
    two.run(save, str(tmp_path))
    expected = list(make("body and head").parameters())
    with World(1) as one:
        results = [*three.run(load, str(tmp_path)), *one.run(load, str(tmp_path))]
    assert len(results) == 4
    for result in results:
        assert all(map(torch.equal, result, expected))


# Wrappers


def part_of_batch(mesh, dtype=torch.float64):
    """This rank's share of the rows; the shares are equal, so that their mean is that of all."""
    (input, target), rank = make_batch(dtype), mesh.get_local_rank()
    return input.chunk(mesh.size())[rank], target.chunk(mesh.size())[rank]


def train_in_ddp(mesh, name, dtype):
    model = DistributedDataParallel(make(name).to(dtype))
    return trained(model, *part_of_batch(mesh, dtype))


@every_model
@every_dtype
def test_distributed_data_parallel_trains_as_one_process(two, dtype, name):
    assert_trained_alike(two.run(train_in_ddp, name, dtype), name, losses=False)


def train_in_fsdp(mesh, name, dtype):
    model = make(name).to(dtype)
    if name == "body and head":
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return trained(model, *part_of_batch(mesh, dtype))


@needs_fsdp_on_cpu
@every_model
@every_dtype
def test_fully_shard_trains_as_one_process(two, dtype, name):
    assert_trained_alike(two.run(train_in_fsdp, name, dtype), name, losses=False)


def train_by_a_method(mesh):
    model = fully_shard(make_classifier(), mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    model.loss(*part_of_batch(mesh)).backward()
    return [full(p.grad) for p in model.parameters()]


@needs_fsdp_on_cpu
def test_the_loss_method_may_be_registered_with_fully_shard(two):
    model = make_classifier()
    expected = torch.autograd.grad(model.loss(*make_batch()), list(model.parameters()))
    for results in two.run(train_by_a_method):
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result, right, rtol=0, atol=1e-12)


def refusal_beside_forward(mesh, soft):
    model = fully_shard(make_classifier(), mesh=mesh)
    input, target = part_of_batch(mesh)
    target = F.one_hot(target, CLASSES).double() if soft else target
    with pytest.raises(ValueError, match="must be the same on every rank") as raised:
        model.loss(input, target)
    return str(raised.value)


@pytest.mark.parametrize("soft", [False, True])
def test_a_method_that_is_not_registered_raises(two, soft):
    """For there the weight is sharded as for class-parallel, which takes the same rows."""
    for message in two.run(refusal_beside_forward, soft):
        assert message.startswith("input must be the same on every rank")


def train_in_both_ways(mesh):
    ways = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("rows", "classes"))
    model = parallelize_module(make("body and head"), ways["classes"], PLAN)
    fully_shard(model, mesh=ways["rows"])
    return trained(model, *part_of_batch(ways["rows"]))


@needs_fsdp_on_cpu
def test_rows_by_fully_shard_and_classes_by_class_parallel():
    name = "body and head"
    with World(4) as four:
        assert_trained_alike(four.run(train_in_both_ways), name, losses=False)
