"""Maps the repository's folders onto import names; everything else about the package is in pyproject.toml.

`kernels/` installs as fastattn.kernels and `benchmarks/` as fastattn.benchmarks, since top-level packages of those
names would shadow other people's. The optional extensions from csrc/ will join as `ext_modules` here; until then the
package is pure Python.
"""

from setuptools import find_packages, setup

BESIDE = {"fastattn.kernels": "kernels", "fastattn.benchmarks": "benchmarks"}

packages = find_packages(include=["fastattn", "fastattn.*"])
for name, folder in BESIDE.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=BESIDE)
