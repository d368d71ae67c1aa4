"""Operators in CUDA C++ (csrc/cuda), where they are built: what each takes, and when it is chosen over its Triton twin."""
