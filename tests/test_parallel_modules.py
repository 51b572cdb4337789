"""The modules on several ranks: sharded in one line, saved and loaded, and inside DDP and FSDP."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from world import World

from torch_softmax import LinearCrossEntropyLoss, SoftmaxRegression
from torch_softmax.class_parallel import ClassParallel

ROWS, FEATURES, CLASSES = 6, 4, 7
STEPS = 3


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{}ranks".format)
def world(request):
    with World(request.param) as world:
        yield world


@pytest.fixture(scope="module")
def two():
    with World(2) as world:
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


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def make_batch():
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
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
            torch.testing.assert_close(parameter, right, rtol=0, atol=1e-12)


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


def part_of_batch(mesh):
    """This rank's share of the rows; the shares are equal, so that their mean is that of all."""
    input, target = make_batch()
    return input.chunk(mesh.size())[mesh.get_rank()], target.chunk(mesh.size())[mesh.get_rank()]


def train_in_ddp(mesh, name):
    return trained(DistributedDataParallel(make(name)), *part_of_batch(mesh))


@every_model
def test_distributed_data_parallel_trains_as_one_process(two, name):
    assert_trained_alike(two.run(train_in_ddp, name), name, losses=False)


def train_in_fsdp(mesh, name):
    model = make(name)
    if name == "body and head":
        fully_shard(model.head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return trained(model, *part_of_batch(mesh))


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 can't fully_shard on a CPU itself"
)
@every_model
def test_fully_shard_trains_as_one_process(two, name):
    assert_trained_alike(two.run(train_in_fsdp, name), name, losses=False)
