"""Instruments the tests and `fastattn verify` are built from; nothing here runs in the ops themselves.

budget        the one error rule every op is judged by (torch only)
checker       bounds, races and program order of interpreted launches (triton, numpy)
stub_driver   the real launch path, compiled for any GPU and launched on none (triton)
sass          what a compiled kernel is made of, read from its machine code (triton's cuobjdump and nvdisasm)

The modules are imported by name where they are used, so that importing this package needs torch alone.
"""
