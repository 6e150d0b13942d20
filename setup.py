"""Which folders an installed fam_jax has. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# The programs and configs of the repository, whose names are too common to install. They import one another by
# relative imports, so they work under both names.
RENAMED = {"fam_jax_launch": "launch", "fam_jax_configs": "configs"}

packages = find_packages(include=["fam_jax", "fam_jax.*"])
for name, folder in RENAMED.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir=RENAMED)
