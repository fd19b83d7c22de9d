"""Which packages are installed; everything else is declared in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["vllm_budgetdraft*"]) + find_packages("kernels"),
    # kernels/ is a source root, not a package: an importable `kernels` would shadow
    # the Hugging Face package of that name, which transformers imports.
    package_dir={"budgetdraft_kernels": "kernels/budgetdraft_kernels"},
)
