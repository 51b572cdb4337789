"""The benchmark's machinery, on tiny shapes: what is measured, left out and written; no times."""

import csv
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.benchmark import command, growth, machine, rivals, start
from scripts.benchmark import measure as measuring
from scripts.benchmark import mnist as mnist_loops
from scripts.benchmark.curvature import HEAD_DIAGONAL, HEAD_PRODUCT, HEAD_PRODUCTS
from scripts.benchmark.losses import FORWARD, HVP, LINEAR, LOGITS, MNIST_STEP, dense, gradients
from scripts.benchmark.measure import Options, Place, Row, Shape, UnavailableError, measure
from scripts.benchmark.mnist import BARE, BY_INDEX
from tests.helpers import one_line
from torch_softmax.mnist.data import ImageDataset, TrainTest

PLACE = Place("cpu", torch.float32, 1)
TINY = Shape(8, 4, 6)
PROBLEMS = [LOGITS, LINEAR, FORWARD, MNIST_STEP, HVP, HEAD_PRODUCT, HEAD_PRODUCTS, HEAD_DIAGONAL]
OF_THIS_PROJECT = [
    (problem, name)
    for problem in PROBLEMS
    for name in problem.contestants
    if name not in rivals.RIVALS
]
COLUMNS = [
    *("section", "shape", "name", "seconds", "ratio", "memory_mib"),
    *("device", "cores", "threads", "dtype", "system"),
    *("python", "torch", "torch_softmax", "rivals"),
]


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """Threads in the place of fresh processes, which take seconds to start."""
    for module in (measuring, start):
        monkeypatch.setattr(module, "fresh_process", lambda: ThreadPoolExecutor(1))


@pytest.fixture
def options(tmp_path):
    return Options(PLACE, seconds=0.0, quick=True, data_dir=tmp_path)


@pytest.fixture
def install(monkeypatch):
    """Put a package in place that has nothing but the names given."""

    def install(module, **names):
        package = ModuleType(module)
        vars(package).update(names)
        monkeypatch.setitem(sys.modules, module, package)

    return install


@pytest.fixture
def layer():
    """x, W and targets of a layer, of more rows than chunks and not a multiple of them."""
    x, W = torch.randn(21, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    return x, W, torch.randint(7, (21,))


def row(section="linear", name="ours", shape=TINY, seconds=1.0, memory=None):
    return Row(section, str(shape), name, seconds, 1.0, memory, PLACE)


def with_contestant(contestant):
    """The linear problem, in which only torch and one other contend."""
    contestants = {"torch dense": LINEAR.contestants["torch dense"], "other": contestant}
    return LINEAR._replace(contestants=contestants)


def events(problem, options, shapes=(TINY,)):
    """The names of the rows that a problem gives, and its remarks."""
    found = list(measure(problem, shapes, options))
    return (
        [event.name for event in found if isinstance(event, Row)],
        [event for event in found if isinstance(event, str)],
    )


class Products(TorchDispatchMode):
    """Counts matrix products; a shape as tiny as ours is one chunk."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def exit_process(*inputs):
    os._exit(9)


# The problems


@pytest.mark.parametrize(
    ("problem", "name"), OF_THIS_PROJECT, ids=lambda part: getattr(part, "section", part)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contestants_give_the_result_of_the_reference(problem, name, dtype):
    measuring.check(problem, name, PLACE._replace(dtype=dtype))


@pytest.mark.parametrize(
    ("problem", "name", "products"),
    [
        (LINEAR, "three products", 3),
        (LINEAR, "torch dense", 3),
        (LINEAR, "ours", 3),
        (FORWARD, "one product", 1),
        (FORWARD, "ours", 1),
        (MNIST_STEP, "two products", 2),
        (MNIST_STEP, "ours", 2),
        (HVP, "five products", 5),
        (HVP, "ours, double backward", 5),
        (HVP, "eight products", 8),
        (HVP, "ours, torch.func", 8),
        (HEAD_PRODUCT, "three products", 3),
        (HEAD_PRODUCT, "a direction: ours, HeadHessian", 3),
        (HEAD_PRODUCTS, "33 products", 33),
        (HEAD_PRODUCTS, "16 directions: ours, one by one", 48),
        (HEAD_DIAGONAL, "two products", 2),
        (HEAD_DIAGONAL, "diagonal: ours", 2),
    ],
    ids=lambda part: getattr(part, "section", part),
)
def test_as_many_products_as_are_claimed(problem, name, products):
    inputs = problem.make_inputs(TINY, PLACE)
    if name in problem.floors:
        run = problem.floors[name](*inputs)
    else:
        run = partial(problem.contestants[name], *inputs)
    with Products() as counted:
        run()
    assert counted.number == products


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.section)
def test_the_inputs_are_the_same_each_time(problem):
    first, second = problem.make_inputs(TINY, PLACE), problem.make_inputs(TINY, PLACE)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_rows_of_a_whole_model_need_no_gradient():
    x, W, _, b = MNIST_STEP.make_inputs(TINY, PLACE)
    assert [tensor.requires_grad for tensor in (x, W, b)] == [False, True, True]


# Measuring


def test_floors_and_contestants_have_a_row_for_each_shape(options):
    rows = list(measure(MNIST_STEP, [TINY, Shape(4, 4, 4)], options))
    assert [(row.shape, row.name) for row in rows] == [
        (shape, name)
        for shape in ("8x4x6", "4x4x4")
        for name in ("two products", "torch dense", "ours")
    ]


def test_ratios_are_to_the_yardstick(options):
    rows = {row.name: row for row in measure(MNIST_STEP, [TINY], options)}
    for row in rows.values():
        assert row.ratio == row.seconds / rows["torch dense"].seconds


def test_contestants_take_turns(options):
    turns = []
    runs = {name: partial(turns.append, name) for name in ("a", "b")}
    assert list(measuring.best_seconds("a", runs, options)) == []
    assert turns == ["a", "b"] * measuring.TURNS


def test_the_turns_go_on_for_the_time_given(options, monkeypatch):
    turns = []
    clock = SimpleNamespace(perf_counter=lambda: len(turns))
    monkeypatch.setattr(measuring, "time", clock)
    runs = {"a": partial(turns.append, "a")}
    list(measuring.best_seconds("a", runs, options._replace(seconds=20)))
    assert len(turns) == 20


def fails(*inputs):
    raise RuntimeError("\nout of memory\nand a long story")


def is_wrong(*inputs):
    loss, *slopes = gradients(dense, *inputs)
    return loss, *(1.01 * slope for slope in slopes)


def is_unavailable(*inputs):
    raise UnavailableError("needs a GPU")


def is_nan(*inputs):
    return tuple(torch.nan * result for result in gradients(dense, *inputs))


@pytest.mark.parametrize(
    ("contestant", "reason"),
    [
        (fails, "fails with RuntimeError: out of memory"),
        (is_unavailable, "needs a GPU"),
        (is_wrong, "its result is wrong, with a relative error of 1.0e-02"),
        (is_nan, "its result is wrong, with a relative error of nan"),
    ],
)
def test_who_cannot_be_measured_is_left_out_with_the_reason(options, contestant, reason):
    names, remarks = events(with_contestant(contestant), options)
    assert names == ["three products", "torch dense"]
    assert remarks == [f"linear at 8x4x6 without other: {reason}"]


def test_one_shape_too_big_leaves_the_others(options):
    def small_only(x, W, target):
        if len(x) == TINY.N:
            raise MemoryError
        return gradients(dense, x, W, target)

    problem = with_contestant(small_only)
    names, remarks = events(problem, options, [Shape(4, 4, 4), TINY])
    assert names.count("other") == 1
    assert remarks == ["linear at 8x4x6 without other: fails with MemoryError"]


def test_who_fails_later_does_not_stop_the_others(options):
    calls = []

    def tires(*inputs):
        calls.append(inputs)
        if len(calls) > 3:
            raise RuntimeError("tired")
        return gradients(dense, *inputs)

    names, remarks = events(with_contestant(tires), options)
    assert names == ["three products", "torch dense"]
    assert remarks == ["linear at 8x4x6 without other: fails with RuntimeError: tired"]


# The memory


@pytest.mark.skipif(sys.platform != "linux", reason="is told by Linux only")
def test_memory_is_what_is_held_above_the_results(monkeypatch):
    monkeypatch.undo()  # in a true process
    shape = Shape(1024, 8, 4096)
    ((_, mib),) = measuring.weigh(LINEAR, "torch dense", [shape], PLACE)
    logits = shape.N * shape.K * 4 / 2**20
    assert 2 * logits <= mib < 4 * logits


def test_a_process_that_is_killed_harms_no_other(monkeypatch, options):
    monkeypatch.undo()
    names, remarks = events(with_contestant(exit_process), options)
    assert names == ["three products", "torch dense"]
    assert remarks[0].startswith("linear at 8x4x6 without other: its process was killed")


def test_no_memory_is_told_of_few_logits():
    assert measuring.memory_mib(LINEAR, "ours", TINY, PLACE) is None


# The rivals


def test_what_is_not_installed_tells_how_it_would_be():
    with pytest.raises(UnavailableError, match=r'pip install "torch_softmax\[bench\]"'):
        rivals.require("no_such_package.losses")


def test_what_lacks_a_package_of_its_own_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        rivals.require("broken_package")


def test_torch_may_be_too_old(monkeypatch, layer):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(UnavailableError, match="doesn't have it yet"):
        rivals.torch_chunked(*layer)


def test_cut_cross_entropy_is_compiled_where_its_kernel_cannot_run(install, layer):
    def loss(x, W, target, impl):
        assert impl == "torch_compile"
        return dense(x, W, target)

    install("cut_cross_entropy", linear_cross_entropy=loss)
    assert rivals.cut_cross_entropy(*layer) == dense(*layer)


def test_liger_needs_a_gpu(install, layer):
    for module in ("liger_kernel", "liger_kernel.transformers"):
        install(module, __path__=[])
    install("liger_kernel.transformers.fused_linear_cross_entropy")
    with pytest.raises(UnavailableError, match="needs a GPU"):
        rivals.liger(*layer)


class TorchtuneLoss:
    """Takes what torchtune's loss takes."""

    def __init__(self, chunks):
        self.chunks = chunks

    def compute_cross_entropy(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="sum")

    def __call__(self, logits, labels):
        parts = zip(logits, labels.chunk(self.chunks, dim=1), strict=True)
        losses = [self.compute_cross_entropy(z.flatten(0, 1), y.flatten()) for z, y in parts]
        return sum(losses) / labels.numel()


def test_torchtune_is_compiled_and_gets_chunks(install, monkeypatch, layer):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f.__name__) or f)
    rivals.compiled_torchtune.cache_clear()
    for module in ("torchtune", "torchtune.modules"):
        install(module, __path__=[])
    install("torchtune.modules.loss", CEWithChunkedOutputLoss=TorchtuneLoss)
    torch.testing.assert_close(rivals.torchtune(*layer), dense(*layer))
    assert compiled == ["compute_cross_entropy"]
    rivals.compiled_torchtune.cache_clear()


# Growth


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 2.5])
def test_the_exponent_of_a_power(power):
    sizes = [1000, 2000, 4000, 8000]
    values = [3e-4 * size**power for size in sizes]
    assert growth.exponent(sizes, values) == pytest.approx(power, abs=1e-9)


def test_the_exponent_of_what_is_no_power_is_the_least_squares():
    # In powers of two: values 0, 1 and 3 at 0, 1 and 2.
    assert growth.exponent([1, 2, 4], [1, 2, 8]) == pytest.approx(1.5)


@pytest.mark.parametrize(("quick", "sizes"), [(True, "N"), (False, "NDK")])
def test_each_size_doubles_by_itself(monkeypatch, options, quick, sizes):
    asked = []
    monkeypatch.setattr(
        growth, "measure", lambda problem, shapes, options: asked.extend(shapes) or []
    )
    list(growth.growth(options._replace(quick=quick)))
    base = growth.QUICK_BASE if quick else growth.BASE
    assert asked == [base] + [
        base._replace(**{size: getattr(base, size) * factor}) for size in sizes for factor in (2, 4)
    ]


def test_growth_is_told_of_each_who_was_measured_throughout(monkeypatch, options):
    shapes = growth.doubled(growth.QUICK_BASE, "N")
    rows = [
        *(row("growth", "ours", s, 2.0 * s.N, memory=70.0) for s in shapes),
        *(row("growth", "torch dense", s, 1.0 * s.N**2, memory=None) for s in shapes),
        *(row("growth", "torch chunked", s, 1.0 * s.N) for s in shapes[:2]),
    ]
    monkeypatch.setattr(growth, "measure", lambda *_: rows)
    found = list(growth.growth(options))
    assert found[: len(rows)] == rows
    assert found[len(rows) :] == [
        "growth of torch dense with N: time to the power 2.00",
        "growth of ours with N: time to the power 1.00, memory to the power 0.00",
    ]


# The loops over MNIST


@pytest.fixture
def examples():
    images = torch.randint(256, (100, 12), dtype=torch.uint8)
    return ImageDataset(images, torch.randint(10, (100,)), 255)


@pytest.mark.parametrize("name", ["tensors in memory", "ours"])
def test_the_loops_come_to_the_same_weights(examples, name):
    loops = mnist_loops.in_memory_loops(examples)
    model, bare = loops[name](), loops[BARE]()
    torch.testing.assert_close(model.state_dict(), bare.state_dict())
    assert bare.weight.norm() > 0


@pytest.fixture
def mnist(monkeypatch, examples):
    """A small data set in the place of MNIST, and of torchvision's."""
    data = TrainTest("mnist", examples, examples)
    monkeypatch.setattr(mnist_loops, "load_dataset", lambda *_: data)
    pixels = examples.images.view(-1, 1, 3, 4) / 255
    singles = list(zip(pixels, examples.labels.tolist(), strict=True))
    monkeypatch.setattr(mnist_loops, "torchvision_mnist", lambda _: singles)


def test_an_epoch_of_each_loop(mnist, options):
    rows = list(mnist_loops.mnist_epoch(options))
    assert [row.name for row in rows] == [
        "ToTensor and Normalize for each image",
        "tensors in memory",
        "ours",
        BY_INDEX,
        BARE,
    ]
    assert {(row.section, row.shape) for row in rows} == {("mnist-epoch", "100x12x10")}
    assert rows[-1].ratio == 1


def test_a_quick_epoch_is_shorter(mnist, options, monkeypatch):
    monkeypatch.setattr(mnist_loops, "QUICK_SIZE", 60)
    assert {row.shape for row in mnist_loops.mnist_epoch(options)} == {"60x12x10"}


def test_without_torchvisions_files_the_other_loops_go_on(mnist, options, monkeypatch):
    def missing(options):
        raise RuntimeError("Dataset not found.")

    monkeypatch.setattr(mnist_loops, "torchvision_mnist", missing)
    remark, *rows = mnist_loops.mnist_epoch(options)
    assert remark.endswith(
        "without torchvision's MNIST: fails with RuntimeError: Dataset not found."
    )
    assert len(rows) == 4


def test_without_mnist_there_is_a_line(options, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    (remark,) = command.run_section("mnist-epoch", options)
    assert remark.startswith("without mnist-epoch: MNIST is not in ")


# The start


def test_imports_are_timed_one_after_the_other():
    torchs, ours = start.import_seconds()
    assert torchs > 0
    assert ours > 0


def test_the_start_has_imports_and_first_steps(options, monkeypatch):
    monkeypatch.setattr(start, "import_seconds", lambda: [2.0, 0.5])
    rows = list(start.start(options))
    assert [(row.name, row.seconds, row.ratio) for row in rows[:2]] == [
        ("import torch", 2.0, 1.0),
        ("and then torch_softmax", 0.5, 0.25),
    ]
    assert [row.name for row in rows[2:]] == ["first step, torch dense", "first step, ours"]


# The command


@pytest.fixture
def output(tmp_path):
    return tmp_path / "numbers.csv"


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(output, *arguments):
    return command.main([f"--output={output}", "--device=cpu", "--seconds=0", *arguments])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_tells_what_was_measured_and_on_what(output, dtype, capsys):
    assert run(output, "--quick", "--sections", "mnist-step", f"--dtype={dtype}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"saved {output}"
    rows = table(output)
    assert list(rows[0]) == COLUMNS
    assert [row["name"] for row in rows] == ["two products", "torch dense", "ours"]
    for row in rows:
        assert (row["shape"], row["dtype"], row["threads"]) == ("128x784x10", dtype, "1")
        assert row["torch"] == torch.__version__


def test_versions_of_the_rivals_that_are_there(monkeypatch):
    def version(package):
        if package != "liger-kernel":
            raise machine.PackageNotFoundError
        return "1.2"

    monkeypatch.setattr(machine, "version", version)
    assert machine.machine(PLACE)["rivals"] == "liger-kernel==1.2"


def test_a_section_that_fails_leaves_its_rows_and_the_others(output, monkeypatch, capsys):
    def failing(options):
        yield row("failing", "first")
        raise RuntimeError("no more")

    monkeypatch.setitem(command.SECTIONS, "failing", failing)
    monkeypatch.setitem(command.SECTIONS, "next", lambda options: iter([row("next", "second")]))
    assert run(output, "--sections", "failing", "next") == 0
    assert [row["name"] for row in table(output)] == ["first", "second"]
    assert "without failing: fails with RuntimeError: no more" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_rows(output, monkeypatch, capsys):
    def interrupted(options):
        yield row(name="first")
        assert [row["name"] for row in table(output)] == ["first"]  # on disk at once
        raise KeyboardInterrupt

    monkeypatch.setitem(command.SECTIONS, "linear", interrupted)
    assert run(output, "--sections", "linear") == 130
    assert one_line(capsys) == "benchmark: interrupted"
    assert [row["name"] for row in table(output)] == ["first"]


def test_nothing_is_written_unless_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(command.SECTIONS, "linear", lambda options: iter([row(name="first")]))
    assert command.main(["--device=cpu", "--sections", "linear"]) == 0
    assert "first" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_table_is_kept(output, capsys):
    output.write_text("hours of work")
    assert run(output) == 1
    assert one_line(capsys) == f"benchmark: output {output} is there already: name another file"
    assert output.read_text() == "hours of work"


def test_a_folder_that_is_not_there(tmp_path, capsys):
    output = tmp_path / "none" / "numbers.csv"
    assert run(output) == 1
    assert one_line(capsys).startswith(f"benchmark: output {output} can't be written: No such")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--threads=0", "threads must be at least 1, got 0"),
        ("--seconds=-1", "seconds must be a finite number of at least 0, got -1.0"),
        ("--seconds=nan", "seconds must be a finite number of at least 0, got nan"),
        ("--dtype=int8", "argument --dtype: invalid choice: 'int8'"),
        ("--sections=all", "argument --sections: invalid choice: 'all'"),
    ],
)
def test_bad_options(output, capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        run(output, option)
    assert one_line(capsys).startswith(f"benchmark: {message}")
    assert not output.exists()
