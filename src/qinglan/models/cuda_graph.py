"""CUDA graphs: work of fixed shape is launched once and for all, and replayed.

One step of a small or middling model is hundreds of kernels of a few microseconds each, and Python needs longer to
launch them than a GPU to run them. A graph holds the launches of one pass; replaying it costs about one of them.
Results are those of the same kernels on the same tensors.
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

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool: Any = torch.cuda.graph_pool_handle()


class Recorded(Generic[Result]):
    """A function that reads and writes the same tensors at every call: run as it is at first, then replayed.

    The function must not look at a value on the GPU, nor choose shapes by one. What it returns are the same tensors at
    every call, overwritten by the next. A function that cannot be recorded goes on as it is, which is said once.
    """

    def __init__(
        self, function: Callable[[], Result], name: str, *, warm_up: int = WARM_UP, space: "Space | None" = None
    ) -> None:
        """Prepare `function` to be recorded after `warm_up` calls; needs a CUDA device.

        `name` says in a message what it is. Graphs of one `space` share their memory: the result of one lasts until
        another is replayed.
        """
        self.function, self.name = function, name
        self.space = space or Space()
        self.calls_before = warm_up
        self.can_record = True
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result

    def __call__(self) -> Result:
        """Run or replay the function."""
        if self.graph is None and self.calls_before == 0 and self.can_record:
            self._record()
        if self.graph is not None:
            self.graph.replay()
            return self.result
        self.calls_before = max(0, self.calls_before - 1)
        stream = self.space.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.function()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.space.pool, stream=self.space.stream):
                self.result = self.function()
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            print(f"{self.name}: cannot be recorded as a CUDA graph ({why}); going on without", file=sys.stderr)
            self.can_record = False
            return
        self.graph = graph
