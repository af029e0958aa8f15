"""CUDA graphs: work of fixed shape is launched once and for all, and replayed.

One step of a small or middling model on a GPU is hundreds of kernels of a few microseconds each, and Python needs
longer to launch them than a GPU to run them. A graph holds the launches of one pass; replaying it costs about one of
them. Results are those of the same kernels on the same tensors.
"""

import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")

WARM_UP = 3
"""Calls that run as they are before one is recorded: libraries allocate and choose their kernels in them."""


class Space:
    """Where graphs are warmed up and recorded: a stream, which autograd remembers, and a pool of memory."""

    def __init__(self, device: torch.device, name: str, on_failure: Callable[[], None] | None = None) -> None:
        """Prepare to record on a CUDA `device`.

        Where a function cannot be recorded, that is said on standard error by `name` and `on_failure` is called; from
        then on every function of this space runs as it is.
        """
        self.device, self.name, self.on_failure = device, name, on_failure
        self.can_record = True
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool: Any = torch.cuda.graph_pool_handle()

    def give_up(self, error: RuntimeError) -> None:
        """Record nothing from now on."""
        self.can_record = False
        why = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"{self.name}: cannot be recorded as a CUDA graph ({why}); going on without", file=sys.stderr)
        if self.on_failure is not None:
            self.on_failure()


class Recorded(Generic[Result]):
    """A function that reads and writes the same tensors at every call: run as it is at first, then replayed.

    The function must not look at a value on the GPU, nor choose shapes by one. What it returns are the same tensors at
    every call, overwritten by the next, and by the next call of any function of the same space.
    """

    def __init__(self, function: Callable[[], Result], space: Space) -> None:
        """Prepare `function` to be recorded after `WARM_UP` calls."""
        self.function, self.space = function, space
        self.calls_before = WARM_UP
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result

    def __call__(self) -> Result:
        """Run or replay the function."""
        with torch.cuda.device(self.space.device):
            if self.graph is None and self.calls_before == 0 and self.space.can_record:
                self._record()
            if self.graph is not None:
                self.graph.replay()
                return self.result
            self.calls_before = max(0, self.calls_before - 1)
            stream, current = self.space.stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                result = self.function()
            current.wait_stream(stream)
            return result

    def _record(self) -> None:
        graph, failure = torch.cuda.CUDAGraph(), None
        torch.cuda.synchronize()
        # Not `torch.cuda.graph`: where the end of a capture fails it leaves its stream the current one.
        with torch.cuda.stream(self.space.stream):
            graph.capture_begin(pool=self.space.pool)
            try:
                self.result = self.function()
            except RuntimeError as error:
                failure = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                failure = failure or error
        if failure is None:
            self.graph = graph
        else:
            self.space.give_up(failure)
