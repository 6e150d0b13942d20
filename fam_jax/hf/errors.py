"""What stops an import or export."""

from fam_jax.config import UserError


class ConvertError(UserError):
    """A folder in Hugging Face format cannot be read exactly, or a model cannot be written as one."""
