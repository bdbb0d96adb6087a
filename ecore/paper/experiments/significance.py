"""One-sided Student's t-tests over seeds (Appendix G)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ecore.packages import needed


def outperforms(ours: Sequence[float], others: Sequence[float] | float, lower_is_better: bool) -> float | str:
    """p of the one-sided Student's t-test of "ours outperforms others", or why there is none.

    Args:
        ours: one value a seed.
        others: likewise, independent of ``ours`` (two samples, equal variances); or one number that the paper
            prints without its seeds (one sample against that number).

    Raises:
        InputError: SciPy is not installed.
    """
    stats = needed("scipy.stats", "Student's t-test over seeds", "'ecore[experiments]'")
    samples = [ours] if isinstance(others, float) else [ours, others]
    if min(map(len, samples)) < 2:
        return "needs at least two seeds"
    if all(np.ptp(sample) == 0 for sample in samples):
        return "the seeds do not differ"
    better = "less" if lower_is_better else "greater"
    if isinstance(others, float):
        return float(stats.ttest_1samp(ours, others, alternative=better).pvalue)
    return float(stats.ttest_ind(ours, others, equal_var=True, alternative=better).pvalue)
