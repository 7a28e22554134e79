"""Training: gradient estimators of the Kullback-Leibler divergences and the loop that uses them."""

from latticeflow.training.estimators import ESTIMATORS, make_estimator
from latticeflow.training.trainer import StepRecord, Trainer, TrainingError, TrainingSettings, hopeless, train

__all__ = [
    "ESTIMATORS",
    "StepRecord",
    "Trainer",
    "TrainingError",
    "TrainingSettings",
    "hopeless",
    "make_estimator",
    "train",
]
