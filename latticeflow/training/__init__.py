"""Training: gradient estimators of the Kullback-Leibler divergences with their loop, and maximum likelihood."""

from latticeflow.training.estimators import ESTIMATORS, make_estimator
from latticeflow.training.exchange import LostProcessError
from latticeflow.training.likelihood import FitRecord, LikelihoodSettings, fit
from latticeflow.training.pieces import Fitted, fit_pieces
from latticeflow.training.pipeline import run_pipeline
from latticeflow.training.samples import held_out_split
from latticeflow.training.trainer import StepRecord, Trainer, TrainingError, TrainingSettings, hopeless, train

__all__ = [
    "ESTIMATORS",
    "FitRecord",
    "Fitted",
    "LikelihoodSettings",
    "LostProcessError",
    "StepRecord",
    "Trainer",
    "TrainingError",
    "TrainingSettings",
    "fit",
    "fit_pieces",
    "held_out_split",
    "hopeless",
    "make_estimator",
    "run_pipeline",
    "train",
]
