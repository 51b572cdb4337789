"""What pyproject.toml can't say: the README without what only this repository can show."""

import re
from pathlib import Path

RELATIVE = r"\((?!https?://|#)[^)]*\)"  # where a picture or a link leads, from here


def stand_alone(markdown: str) -> str:
    """Leave out the pictures that are files of the repository, and make of links to such words."""
    without_pictures = re.sub(rf"^!\[[^\]]*\]{RELATIVE}\n", "", markdown, flags=re.MULTILINE)
    return re.sub(rf"\[([^\]]*)\]{RELATIVE}", r"\1", without_pictures)


if __name__ == "__main__":
    from setuptools import setup

    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(
        long_description=stand_alone(readme),
        long_description_content_type="text/markdown",
    )
