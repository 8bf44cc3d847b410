"""Run the arms of a benchmark, compare them and print the results."""

import json
import warnings

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from sklembed.evaluation.adaptations import corrected_t_test


def in_parallel(options, plan):
    """Run each (function, *arguments) of a plan; return a table with a row per result."""
    results = Parallel(n_jobs=options.n_jobs, batch_size=1)(
        delayed(quietly)(*call) for call in plan
    )
    rows = []
    for result in results:
        if isinstance(result, list):
            rows.extend(result)
        else:
            rows.append(result)
    return pd.DataFrame(rows)


def quietly(run, *arguments):
    """Call a function; ignore warnings, mostly of classifiers that do not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*arguments)


def summarise(cells, keys, measures, medians=None):
    """Return records of mean ± standard deviation over folds and seeds, and of medians.

    `medians` maps columns, such as seconds, to their number of digits.
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
    """Compare two arms by their differences within folds."""
    keys = [name for name in ("seed", "fold") if name in rows]
    wide = rows.pivot_table(measure, keys, "arm")
    return judge_gains((wide[arm] - wide[other]).dropna(), n_folds)


def judge_gains(gains, n_folds):
    """Summarise the gains over folds, and test whether their mean is zero.

    The t-test is corrected for overlapping training sets (Nadeau and Bengio, 2003).
    """
    test = corrected_t_test(np.asarray(gains), 1 / (n_folds - 1))
    return {
        "gain": test["gain"],
        "sd": test["gain sd"],
        "folds won": f"{(gains > 0).mean():.0%}",
        "p": test["p"],
    }


def show(result, path=None):
    """Print tables of records, and write them as JSON if there is a path."""
    for name, rows in result.items():
        print(f"\n{name}\n{pd.DataFrame(rows).to_string(index=False)}")
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
