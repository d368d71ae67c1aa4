"""The benchmark suite: `bench_<op>.py` for each op, over a few shared modules. Installed as `fastattn.benchmarks`; run by `fastattn bench`."""
