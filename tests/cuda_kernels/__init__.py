"""An op's module a source of csrc/cuda: SOURCE, CASES, FAULTS, and FAR, cases of which a buffer spans gigabytes."""
