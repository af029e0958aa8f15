"""Independent parts of one computation, several at a time on a CPU, with a share of its threads each.

Operations on small matrices end before a team of threads has gathered: two threads that each run whole operations get
more done than two that share every one. Python waits in its lock only between operations.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def in_order(function: Callable[[Part], Result], parts: Iterable[Part], at_once: int) -> list[Result]:
    """Return the results of `function` for all parts, in their order; `at_once` of them run at the same time.

    Whether gradients are recorded is as around the call; every other context of PyTorch's belongs into the function.
    An error ends the call once the parts that run have ended. One call at a time: threads are counted for the process.
    """
    if at_once == 1:
        return [function(part) for part in parts]
    parts = list(parts)
    num_threads, is_recording = torch.get_num_threads(), torch.is_grad_enabled()

    def start() -> None:
        torch.set_num_threads(max(1, num_threads // at_once))
        # Weights that one thread has rounded must not serve another: the bits of a gradient would depend on timing.
        torch.set_autocast_cache_enabled(False)

    def call(part: Part) -> Result:
        with torch.set_grad_enabled(is_recording):
            return function(part)

    try:
        with ThreadPoolExecutor(at_once, initializer=start) as pool:
            futures = [pool.submit(call, part) for part in parts]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        failed = next((future for future in futures if not future.cancelled() and future.exception()), None)
        return [future.result() for future in ([failed] if failed else futures)]
    finally:
        torch.set_num_threads(num_threads)  # new threads elsewhere begin with what was set last
