"""How benchmarks run their arms, compare them and show what they found."""

import json
import warnings

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.stats import t as student


def in_parallel(options, plan):
    """Run each cell of a plan of (function, *arguments); return a row for each result."""
    results = Parallel(n_jobs=options.n_jobs, batch_size=1)(
        delayed(quietly)(*c) for c in plan
    )
    return pd.DataFrame(
        [
            row
            for result in results
            for row in (result if isinstance(result, list) else [result])
        ]
    )


def quietly(run, *arguments):
    """Call without the warnings of classifiers that have not converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*arguments)


def summarise(cells, keys, measures, medians=None):
    """Return records of means and sds over folds, and seeds, and of medians.

    `medians` maps what to take the median of to the digits it is shown with.
    """
    by = cells.groupby(keys, sort=False)
    means, sds = by[measures].mean(), by[measures].std()
    table = means.map("{:.3f}".format) + " ± " + sds.map("{:.3f}".format)
    table = table.where(means.notna(), "")
    for name, digits in (medians or {}).items():
        median = by[name].median()
        table[name] = median.map(f"{{:.{digits}f}}".format).where(median.notna(), "")
    return table.reset_index().to_dict("records")


def difference(rows, arm, other, measure, n_folds):
    """Compare two arms by their differences in the same folds."""
    keys = [name for name in ("seed", "fold") if name in rows]
    wide = rows.pivot_table(measure, keys, "arm")
    return judge_gains((wide[arm] - wide[other]).dropna(), n_folds)


def judge_gains(gains, n_folds):
    """Summarise the gains of folds, and test whether their mean is zero.

    The t-test is corrected for folds that share training rows (Nadeau and Bengio, 2003).
    """
    error = np.sqrt((1 / len(gains) + 1 / (n_folds - 1)) * gains.var(ddof=1))
    return {
        "gain": gains.mean(),
        "sd": gains.std(),
        "folds won": f"{(gains > 0).mean():.0%}",
        "p": 2 * student.sf(abs(gains.mean() / error), len(gains) - 1),
    }


def show(result, path=None):
    """Print tables of records; write them as JSON where that is wanted."""
    for name, rows in result.items():
        print(f"\n{name}\n{pd.DataFrame(rows).to_string(index=False)}")
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
