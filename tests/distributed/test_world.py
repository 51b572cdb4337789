"""The processes of the tests: they answer, fail and end as they should."""

import os
import time

import pytest

from tests.distributed.world import RankError, World


def rank_and_size(mesh):
    return mesh.get_local_rank(), mesh.size()


def wait_on_the_last_rank(mesh):
    if mesh.get_local_rank() == mesh.size() - 1:
        time.sleep(60)


def fail_on_the_last_rank(mesh):
    return 1 / (mesh.size() - 1 - mesh.get_local_rank())


def process_id(mesh):
    return os.getpid()


@pytest.fixture(scope="module")
def world():
    with World(2) as world:
        yield world


def test_every_rank_answers(world):
    assert world.run(rank_and_size) == [(0, 2), (1, 2)]


def test_a_failure_has_its_traceback(world):
    with pytest.raises(RankError, match=r"in fail_on_the_last_rank\n(.*\n)*ZeroDivisionError"):
        world.run(fail_on_the_last_rank)
    assert world.run(rank_and_size) == [(0, 2), (1, 2)]


def test_a_call_that_takes_too_long_ends_and_the_next_one_is_as_ever(world):
    before = world.run(process_id)
    world.limit = 0.2
    with pytest.raises(RankError, match=r"^rank 1 took too long$"):
        world.run(wait_on_the_last_rank)
    world.limit = 60
    assert not set(before) & set(world.run(process_id))


def test_no_process_is_left():
    with World(2) as world:
        processes = world.run(process_id)
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
