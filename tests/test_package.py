"""What `import fam_jax` gives to a notebook."""

import importlib.metadata

import pytest

import fam_jax


def test_the_names_of_the_package() -> None:
    assert fam_jax.__version__ == importlib.metadata.version("fam-jax")
    assert fam_jax.__doc__ is not None and "fam_jax.TextModel.restore" in fam_jax.__doc__
    for name in fam_jax.__all__:
        assert getattr(fam_jax, name) is not None and name in dir(fam_jax)
    with pytest.raises(AttributeError, match="module 'fam_jax' has no attribute 'missing'"):
        _ = fam_jax.missing
