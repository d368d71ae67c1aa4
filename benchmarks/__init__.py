"""The benchmark suite: `bench_<op>.py` for each op, over a few shared modules; run by `fastattn bench`.

Installed as `fastattn.benchmarks`.
"""
