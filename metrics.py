"""metrics.py: numbers of the tables that are more than a count."""


def auroc(scores, labels):
    """Area under the ROC curve: the share of (positive, negative) pairs whose positive scores higher, ties count half.

    scores (n,), labels (n,) in {0, 1} -> number in [0, 1], exact (by ranks, float64); None without both classes.
    """
    labels = labels.bool()
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        return None
    _, which, count = scores.double().unique(return_inverse=True, return_counts=True)
    rank = count.cumsum(0) - (count.double() - 1) / 2      # of each distinct score, from 1: the mean over its ties
    return ((rank[which][labels].sum() - positive * (positive + 1) / 2) / (positive * negative)).item()
