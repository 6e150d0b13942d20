"""TransformerFAM in JAX and Flax: transformers with feedback attention as working memory.

    import fam_jax

    config = fam_jax.Config(...)                     # or resolve(get_config()) of a file in configs/
    fam_jax.train(config, "runs/book")               # train, or resume
    fam_jax.evaluate("runs/book")                    # measure a checkpoint
    model = fam_jax.TextModel.restore("runs/book")   # read and generate text
    fam_jax.Transformer                              # the decoder itself, a Flax module

The names below are loaded when they are first used, so `import fam_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fam_jax.config import Config, ModelConfig, UserError, memory_config, resolve
    from fam_jax.evaluation.run import evaluate
    from fam_jax.generation.text import TextModel
    from fam_jax.model import Transformer
    from fam_jax.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ModelConfig",
    "TextModel",
    "Transformer",
    "UserError",
    "__version__",
    "evaluate",
    "memory_config",
    "resolve",
    "train",
]

_MODULES = {
    "Config": "fam_jax.config",
    "ModelConfig": "fam_jax.config",
    "TextModel": "fam_jax.generation.text",
    "Transformer": "fam_jax.model",
    "UserError": "fam_jax.config",
    "evaluate": "fam_jax.evaluation.run",
    "memory_config": "fam_jax.config",
    "resolve": "fam_jax.config",
    "train": "fam_jax.training.loop",
}


def __getattr__(name: str) -> Any:
    """Load an exported name.

    Raises:
      AttributeError: the package exports no such name.
    """
    if name not in _MODULES:
        raise AttributeError(f"module 'fam_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
