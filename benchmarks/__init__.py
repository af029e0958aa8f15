"""Benchmarks against peers in one run on the same machine; `make bench` runs all, docs/benchmarks.md explains them.

    python -m benchmarks                      everything
    python -m benchmarks reward --setting llama --pairs 6

Every job is one file with `ours` and `peer`. `harness.py` starts both sides as processes of their own and lets them run
by turns; `worker.py` is what runs in them; `workloads.py` makes models and data that both read.
"""
