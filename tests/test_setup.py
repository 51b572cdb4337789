"""The README as a package carries it: nothing in it leads into a repository that is not there."""

import re
import runpy

import pytest

from tests.helpers import ROOT

stand_alone = runpy.run_path(str(ROOT / "setup.py"))["stand_alone"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("before\n![a chart](scripts/time.svg)\nafter\n", "before\nafter\n"),
        ("see [the log](CHANGELOG.md).", "see the log."),
        ("![a badge](https://a.b/c.svg)\n", "![a badge](https://a.b/c.svg)\n"),
        ("[a page](https://a.b) and [a part](#part)", "[a page](https://a.b) and [a part](#part)"),
    ],
)
def test_only_what_is_relative_goes(markdown, expected):
    assert stand_alone(markdown) == expected


def test_no_relative_picture_or_link_is_left_of_the_readme():
    targets = re.findall(r"\]\(([^)]*)\)", stand_alone(README))
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_the_code_in_the_readme_stays():
    blocks = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert blocks.findall(stand_alone(README)) == blocks.findall(README)
