"""How much an ablation changes the loss: paired differences over documents, with confidence intervals.

Documents differ far more from each other than a document does from itself without memory. Each is therefore compared
with itself, and the interval is over documents: tokens of one document are not independent.
"""

from typing import NamedTuple

import numpy as np
import scipy.stats

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """A mean difference per token, and the limits of its 95 % confidence interval (None for a single document)."""

    mean: float
    low: float | None
    high: float | None

    @property
    def distinct(self) -> bool:
        """Return whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def __str__(self) -> str:
        """Return the difference with its interval, such as "+0.0190, 95 % interval +0.0101 to +0.0279"."""
        if self.low is None or self.high is None:
            return f"{self.mean:+.4f}, no interval from one document"
        return f"{self.mean:+.4f}, 95 % interval {self.low:+.4f} to {self.high:+.4f}"


def difference_per_token(sums: np.ndarray, tokens: np.ndarray) -> Difference:
    """Return the mean difference per token over documents of different lengths.

    The mean is the sum of all differences divided by the number of all tokens, so that it equals the difference of the
    two losses. Its variance is that of a ratio estimator, and the interval is Student's with n - 1 degrees of freedom.

    Args:
      sums: (n,) a document's sum of (changed loss - loss) over its tokens, in nats.
      tokens: (n,) its number of tokens; documents with 0 are left out.

    Raises:
      ValueError: no document has a token.
    """
    sums, tokens = np.asarray(sums, np.float64), np.asarray(tokens, np.float64)
    seen = tokens > 0
    sums, tokens, count = sums[seen], tokens[seen], int(seen.sum())
    if count == 0:
        raise ValueError("no document has a token")
    mean = sums.sum() / tokens.sum()
    if count == 1:
        return Difference(float(mean), None, None)
    residuals = sums - mean * tokens
    error = np.sqrt(count / (count - 1) * np.square(residuals).sum()) / tokens.sum()
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error
    return Difference(float(mean), float(mean - half), float(mean + half))
