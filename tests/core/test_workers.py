"""Parts that run at the same time: results in order, errors heard, settings of the caller kept."""

import threading
import time

import pytest
import torch

from qinglan.core.workers import in_order


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_whoever_is_ready_first(four_threads):
    def slow(number):
        time.sleep(0.02 * (3 - number))
        return number

    assert in_order(slow, range(4), at_once=4) == [0, 1, 2, 3]


def test_parts_run_at_the_same_time_with_a_share_of_the_threads_each(four_threads):
    gate = threading.Barrier(2, timeout=10)  # alone, a part would wait here for ever

    def meet(_number):
        gate.wait()
        return torch.get_num_threads(), threading.get_ident()

    found = in_order(meet, range(2), at_once=2)
    assert [threads for threads, _ in found] == [2, 2]
    assert len({ident for _, ident in found}) == 2
    assert torch.get_num_threads() == 4


def test_one_at_a_time_stays_in_the_thread_of_the_caller():
    assert in_order(lambda _: threading.get_ident(), range(3), at_once=1) == [threading.get_ident()] * 3


def test_gradients_are_recorded_as_around_the_call():
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        assert [product.requires_grad for product in in_order(lambda x: weight * x, range(2), 2)] == [False, False]
    assert [product.requires_grad for product in in_order(lambda x: weight * x, range(2), 2)] == [True, True]


def test_an_error_is_raised_and_what_has_not_begun_is_left(four_threads):
    begun = []

    def fail(number):
        begun.append(number)
        if number == 0:
            raise ValueError("part 0")
        time.sleep(0.05)

    with pytest.raises(ValueError, match="part 0"):
        in_order(fail, range(50), at_once=2)
    assert len(begun) < 10
    assert torch.get_num_threads() == 4


def test_an_error_while_parts_are_made_starts_none(four_threads):
    def parts():
        yield 0
        raise ValueError("part 1")

    with pytest.raises(ValueError, match="part 1"):
        in_order(lambda _: pytest.fail("begun"), parts(), at_once=2)


def test_threads_do_not_share_rounded_weights(four_threads):
    with torch.autocast("cpu", torch.bfloat16):
        assert in_order(lambda _: torch.is_autocast_cache_enabled(), range(2), at_once=2) == [False, False]
        assert torch.is_autocast_cache_enabled()
