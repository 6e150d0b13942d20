"""Small integer arithmetic."""


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up, for integers with b > 0."""
    return -(-a // b)
