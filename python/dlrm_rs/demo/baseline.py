"""Logistic regression on the features that the DLRM has: what a model must beat to be worth its tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from dlrm_rs.data.flights import CATEGORIES, Flights, Samples
from dlrm_rs.demo.training import Metrics

# Inverse strengths of the L2 penalty to choose from, around the best of months held out of the training flights.
STRENGTHS = (0.01, 0.03, 0.1)

# Far above what it takes.
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Baseline:
    """A fitted logistic regression.

    Attributes:
        strength: The inverse strength of the penalty that was best on the validation flights.
        validation: How it does there.
        test: How it does on the test flights.
    """

    strength: float
    validation: Metrics
    test: Metrics


def fit_baseline(flights: Flights, train: Samples) -> Baseline:
    """Fit one per penalty, and keep that with the best AUC on the validation flights.

    Args:
        flights: The data set.
        train: The samples to fit: `flights.train` or some of it.
    """
    encoder = _one_column_per_id(flights)
    x, y = encoder.fit_transform(_columns(train)), train.labels.numpy()
    fits = [LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(x, y) for strength in STRENGTHS]

    def evaluate(model: LogisticRegression, samples: Samples) -> Metrics:
        probabilities = model.predict_proba(encoder.transform(_columns(samples)))[:, 1]
        return Metrics.of(samples.labels, torch.from_numpy(probabilities))

    validation = [evaluate(fit, flights.validation) for fit in fits]
    best = int(np.argmax([metrics.auc for metrics in validation]))
    return Baseline(STRENGTHS[best], validation[best], evaluate(fits[best], flights.test))


def _columns(samples: Samples) -> NDArray[np.float64]:
    """Ids, dense features and conditions side by side, `(n, len(CATEGORIES) + P + len(CONDITIONS))`."""
    return np.hstack([samples.ids.numpy(), samples.dense.numpy(), samples.conditions.numpy()], dtype=np.float64)


def _one_column_per_id(flights: Flights) -> ColumnTransformer:
    """Make a sparse matrix of `_columns`: each id of each feature becomes a column of 0 and 1, the others stay."""
    ids = OneHotEncoder(categories=[np.arange(flights.num_embeddings[name]) for name in CATEGORIES])
    return ColumnTransformer([("ids", ids, slice(len(CATEGORIES)))], remainder="passthrough", sparse_threshold=1.0)
