"""What the tests of several processes share."""

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="module")
def two():
    with World(2) as world:
        yield world
