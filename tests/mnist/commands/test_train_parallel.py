import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.distributed.world import World
from tests.helpers import ROOT
from torch_softmax import SoftmaxRegression
from torch_softmax.distributed.data_parallel import Ranks, join_ranks
from torch_softmax.mnist import runs
from torch_softmax.mnist.checkpoints import Checkpoint, load_checkpoint
from torch_softmax.mnist.data import BatchLoader, ImageDataset, load_dataset
from torch_softmax.mnist.download import DataError
from torch_softmax.mnist.settings import Settings, newton_defaults
from torch_softmax.mnist.training import batch_update

SCRIPT = ROOT / "train_mnist.py"
TORCHRUN = [*(sys.executable, "-m", "torch.distributed.run"), "--standalone", "--nproc-per-node=2"]


def lines_of_ours(printed):
    """What the processes have printed, without what torchrun adds."""
    return [line for line in printed.splitlines() if line.startswith("torch-softmax train: ")]


def test_data_that_cannot_be_had_are_one_line_of_all_processes(tmp_path):
    data = ["--dataset=idx", f"--data-dir={tmp_path}", "--device=cpu"]
    run = [*TORCHRUN, SCRIPT, *data, f"--output-dir={tmp_path / 'run'}"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    (line,) = lines_of_ours(result.stderr)
    assert line.startswith("torch-softmax train: idx needs the files train-images-idx3-ubyte, ")
    # The one traceback is torchrun's own, about processes that have ended.
    assert result.stderr.count("Traceback") == 1
    assert "DataNotFoundError" not in result.stderr


def interrupted_under_torchrun(directory):
    """What is printed before and after Ctrl-C, which reaches torchrun and its processes."""
    options = ["--dataset=digits", "--epochs=100000", "--schedule=constant", "--device=cpu"]
    run = subprocess.Popen(
        [*TORCHRUN, SCRIPT, *options, f"--output-dir={directory}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        first = [line for _, line in zip(range(3), run.stdout, strict=False)]
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=120)
        return "".join(first) + out, err
    finally:
        run.kill()


def test_the_first_process_reports_and_an_interruption_tells_how_to_go_on(tmp_path):
    directory = tmp_path / "run"
    out, err = interrupted_under_torchrun(directory)
    (line,) = lines_of_ours(err)
    assert line == (
        "torch-softmax train: interrupted; go on with: torchrun --nproc-per-node 2 "
        f"-m torch_softmax resume {directory} --device cpu"
    )
    epochs = [line.split()[1] for line in out.splitlines() if line.startswith("epoch")]
    assert epochs == [f"{number}/100000" for number in range(1, len(epochs) + 1)]
    assert load_checkpoint(directory).epoch == len(epochs)
    assert [path.name for path in directory.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_parts_of_all_ranks_are_the_batches(size):
    numbered = ImageDataset(torch.zeros(20, 1, dtype=torch.uint8), torch.arange(20), 255)
    parts = []
    for rank in range(size):
        generator = torch.Generator().manual_seed(0)
        loader = BatchLoader(numbered, 6, generator, Ranks(rank, size))
        parts.append([labels for _, labels in loader])
    whole = [labels for _, labels in BatchLoader(numbered, 6, torch.Generator().manual_seed(0))]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(torch.cat(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_alone_joins_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_ranks(torch.device("cpu")) as ranks:
        assert ranks == Ranks(0, 1)
        assert not torch.distributed.is_initialized()


def test_a_device_that_cannot_talk_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="device must be cpu or cuda under torchrun, got 'mps'"),
        join_ranks(torch.device("mps")),
    ):
        pass


def test_one_rank_means_its_own_values():
    model = SoftmaxRegression(2, 3)
    values = list(model.parameters())
    means = Ranks().mean(torch.tensor(4), *values)
    assert all(mean is value for mean, value in zip(means, values, strict=True))


FEATURES, CLASSES = 5, 4


def batch(kind):
    """A batch of 7 rows, which 2 and 3 ranks share unequally."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(7, FEATURES, generator=generator)
    if kind == "probabilities":
        return input, torch.rand(7, CLASSES, generator=generator).softmax(1)
    target = torch.randint(CLASSES, (7,), generator=generator)
    if kind == "some ignored":
        target[torch.tensor([0, 2, 4])] = -100  # of two ranks the first has all but one of these
    if kind == "one left":
        target[1:] = -100  # whatever the number of ranks, all but the first have none
    if kind == "fewer rows than ranks":
        return input[:1], target[:1]
    return input, target


def updated(ranks, kind):
    """The loss and the parameters after an update with this rank's part of the batch."""
    torch.manual_seed(1)
    model = SoftmaxRegression(FEATURES, CLASSES)
    input, target = batch(kind)
    part = ranks.part(torch.arange(len(input)))
    loss, _ = batch_update(model, input[part], target[part], lr=0.5, weight_decay=0.1, ranks=ranks)
    return [loss, *(parameter.detach() for parameter in model.parameters())]


def updated_on_rank(mesh, kind):
    return updated(Ranks(mesh.get_rank(), mesh.size()), kind)


@pytest.fixture(scope="module", params=[3], ids="{}ranks".format)
def world(request):
    with World(request.param) as world:
        yield world


KINDS = ["labels", "some ignored", "one left", "probabilities", "fewer rows than ranks"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_take_the_step_of_one_process(world, kind):
    expected = updated(Ranks(), kind)
    for result in world.run(updated_on_rank, kind):
        for value, of_one in zip(result, expected, strict=True):
            torch.testing.assert_close(value, of_one, rtol=0, atol=1e-6)


# 1,442 examples in batches of 67 leave a last one of 35, which the ranks can't share equally.
BATCHES = Settings(epochs=2, batch_size=67, lr=1.0)


def trained(ranks, train, settings):
    """The last state of a run on the digits."""
    data = load_dataset("digits", "nowhere")
    return train(Checkpoint.start(settings, data), data.train, None, ranks)


def trained_on_rank(mesh, *run):
    return trained(Ranks(mesh.get_rank(), mesh.size()), *run)


@pytest.mark.parametrize(
    ("train", "settings", "tolerance"),
    [(runs.train_by_batches, BATCHES, 1e-6), (runs.train_by_newton, newton_defaults(1442), 1e-3)],
)
def test_the_ranks_train_the_weights_of_one_process(world, train, settings, tolerance):
    expected = trained(Ranks(), train, settings)
    for result in world.run(trained_on_rank, train, settings):
        for name, weight in expected.model.items():
            torch.testing.assert_close(result.model[name], weight, rtol=0, atol=tolerance)
        for told, of_one in zip(result.history, expected.history, strict=False):
            assert told["accuracy"] == of_one["accuracy"]
            assert told["loss"] == pytest.approx(of_one["loss"], abs=1e-5)


def failures_on_rank(mesh, context, failing):
    """What a block raises that fails on some of the ranks, and whether this one did it."""
    ranks = Ranks(mesh.get_rank(), mesh.size())
    done = False
    try:
        with getattr(ranks, context)():
            done = True
            if ranks.rank in failing:
                raise DataError(f"on rank {ranks.rank}")
    except DataError as error:
        return str(error), done
    return None, done


@pytest.mark.parametrize("context", ["together", "first_ahead"])
def test_what_fails_on_one_rank_fails_on_all(world, context):
    last = world.size - 1
    results = world.run(failures_on_rank, context, [last])
    assert results == [(f"on rank {last}", True)] * world.size
    assert world.run(failures_on_rank, context, []) == [(None, True)] * world.size


def test_what_fails_on_the_first_rank_is_not_tried_on_the_others(world):
    first, *others = world.run(failures_on_rank, "first_ahead", [0])
    assert first == ("on rank 0", True)
    assert set(others) == {("on rank 0", False)}


def test_one_rank_raises_its_own_error():
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as raised, Ranks().first_ahead():
        raise error
    assert raised.value is error


def totals_on_rank(mesh):
    return Ranks(mesh.get_rank(), mesh.size()).total(mesh.get_rank(), torch.tensor(2), True)


def test_counts_add_up_over_the_ranks(world):
    size = world.size
    assert world.run(totals_on_rank) == [[size * (size - 1) // 2, 2 * size, size]] * size
