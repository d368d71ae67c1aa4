"""fastattn's Triton kernels and their launchers. This folder installs, and imports everywhere, as `fastattn.kernels`.

Read `attention.py` first: a kernel, then the launcher that calls it. Nothing in here knows autograd, torch.library
or an environment variable.
"""

if __name__ == "kernels":
    # With the repository's root on sys.path (`python -c`, `python -m pytest`, a script there) this folder is what
    # `import kernels` finds, but Hugging Face's package is what is meant: load that one in this module's place.
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    spec = PathFinder.find_spec("kernels", [path for path in sys.path if os.path.realpath(path or os.curdir) != root])
    if spec is not None and spec.loader is not None:
        sys.modules["kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels"])
    else:
        # Not installed: be an empty namespace, as a folder without __init__.py would. transformers looks for the
        # package, then imports it to read its version: it takes a namespace for none, and breaks on an ImportError.
        __file__ = None
        __path__ = []
