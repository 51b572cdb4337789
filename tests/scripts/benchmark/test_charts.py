"""The charts of a benchmark: what they show, and how the command takes bad input."""

from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")
from scripts.benchmark import charts
from scripts.benchmark.losses import LINEAR
from tests.helpers import one_line, texts

HEADER = "section,shape,name,seconds,ratio,memory_mib,device,threads,dtype,torch,python"
MACHINE = "Some CPU,2,float32,2.14.1,3.11.7"
BENCHMARK = [
    HEADER,
    f"logits,8x1x9,ours,1,77,,{MACHINE}",
    f"linear,2048x512x32768,three products,1,1,268,{MACHINE}",
    f"linear,2048x512x32768,torch dense,1.27,1.27,715,{MACHINE}",
    f"linear,2048x512x32768,ours,1.04,1.04,87,{MACHINE}",
    f"linear,128x784x10,three products,1,1,,{MACHINE}",
    f"linear,128x784x10,ours,3.65,3.65,,{MACHINE}",
]


@pytest.fixture
def table(tmp_path):
    """Writes a benchmark's lines, and returns the path."""

    def write(*lines):
        path = tmp_path / "table.csv"
        path.write_text("".join(line + "\n" for line in lines))
        return path

    return write


def draw_benchmark(path):
    return charts.draw_benchmark(charts.read_benchmark(path))


def test_a_benchmark_becomes_two_small_svg_files(table, capsys):
    path = table(*BENCHMARK)
    assert charts.main([str(path)]) == 0
    files = [path.with_name(f"table-{name}.svg") for name in ("time", "memory")]
    assert capsys.readouterr().out.splitlines() == [f"saved {file}" for file in files]
    for file in files:
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
        assert file.stat().st_size < 60_000


def test_output_gives_the_charts_their_names(table, tmp_path):
    (tmp_path / "docs").mkdir()
    output = tmp_path / "docs" / "linear.svg"
    assert charts.main([str(table(*BENCHMARK)), f"--output={output}"]) == 0
    names = {path.name for path in output.parent.iterdir()}
    assert names == {"linear-time.svg", "linear-memory.svg"}


def test_the_same_numbers_make_the_same_file(table):
    path = table(*BENCHMARK)
    chart = path.with_name("table-time.svg")
    charts.main([str(path)])
    first = chart.read_bytes()
    charts.main([str(path)])
    assert chart.read_bytes() == first


def test_the_charts_have_a_bar_for_each_loss_that_was_measured(table):
    charts = draw_benchmark(table(*BENCHMARK))
    for name, numbers in [
        ("time", ["1.27 ×", "1.04 ×", "3.65 ×"]),
        ("memory", ["715 MiB", "87 MiB"]),
    ]:
        (axes,) = charts[name].axes
        told = [text.strip() for text in texts(axes)]
        assert [text for text in told if text != "three products"] == numbers
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert ends == pytest.approx([float(number.split()[0]) for number in numbers])


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_rivals_have_bars_where_they_were_measured(table):
    rival = BENCHMARK[3].replace("torch dense", "cut-cross-entropy")
    with_rival = draw_benchmark(table(*BENCHMARK, rival))
    without = draw_benchmark(table(*BENCHMARK))
    for name in ("time", "memory"):
        assert legend(without[name]) == ["ours", "torch dense"]
        assert legend(with_rival[name]) == ["ours", "torch dense", "cut-cross-entropy"]
        bars = [len(chart[name].axes[0].patches) for chart in (without, with_rival)]
        assert bars[1] == bars[0] + 1


def test_every_contestant_of_the_benchmark_has_a_colour():
    assert set(LINEAR.contestants) == set(charts.COLORS)


def test_the_floor_is_a_line_with_its_name(table):
    (axes,) = draw_benchmark(table(*BENCHMARK))["time"].axes
    assert "three products" in texts(axes)
    assert [1, 1] in [list(line.get_xdata()) for line in axes.lines]


def test_the_bars_of_time_begin_at_nothing(table):
    (axes,) = draw_benchmark(table(*BENCHMARK))["time"].axes
    assert {bar.get_x() for bar in axes.patches} == {0}


def test_no_bar_of_time_where_the_floor_was_not_measured(table):
    row = BENCHMARK[4].replace("1.04,1.04", "1.04,nan")
    assert list(draw_benchmark(table(HEADER, row))) == ["memory"]


def test_the_charts_tell_where_the_numbers_are_from(table):
    for chart in draw_benchmark(table(*BENCHMARK)).values():
        assert texts(chart)[1].endswith("Some CPU, 2 threads, float32, torch 2.14.1")


def test_no_chart_of_memory_where_none_was_measured(table):
    assert list(draw_benchmark(table(HEADER, BENCHMARK[-1]))) == ["time"]


def test_memory_within_the_noise_has_a_bar_of_no_length(table):
    noise = f"linear,128x784x10,ours,1,1,-3.7,{MACHINE}"
    (axes,) = draw_benchmark(table(HEADER, noise))["memory"].axes
    assert axes.patches[0].get_width() == 0


# Bad input


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "table must have rows of the section 'linear' from one machine and dtype, got those"),
        (BENCHMARK[:2], "table must have rows of the section 'linear' from one machine and dtype"),
        (
            [*BENCHMARK, BENCHMARK[-1].replace("float32", "bfloat16")],
            "table must have rows of the section 'linear' from one machine and dtype, got those "
            "of 2 in",
        ),
        (["a,b", "1,2"], "table must be a CSV of scripts.benchmark, got"),
        ([HEADER, "linear,8x8,ours"], "table must be a CSV of scripts.benchmark, got"),
        ([HEADER, f"linear,8x8x8,ours,1,fast,,{MACHINE}"], "table must be a CSV of"),
        ([HEADER, "\0"], "table must "),
    ],
)
def test_a_table_that_is_no_benchmark(table, capsys, lines, message):
    path = table(*lines)
    with pytest.raises(SystemExit, match="2"):
        charts.main([str(path)])
    assert one_line(capsys).startswith(f"benchmark.charts: {message}")
    assert list(path.parent.iterdir()) == [path]


def test_a_table_that_is_not_there(tmp_path, capsys):
    assert charts.main([str(tmp_path / "none")]) == 1
    assert "No such file or directory" in one_line(capsys)
