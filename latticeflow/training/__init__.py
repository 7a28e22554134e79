"""Training: gradient estimators of the Kullback-Leibler and Fisher divergences with their loop, and fits to samples."""

from latticeflow.training.averaging import WeightAverage
from latticeflow.training.estimators import ESTIMATORS, make_estimator
from latticeflow.training.exchange import LostProcessError
from latticeflow.training.likelihood import FitRecord, LikelihoodSettings, fit
from latticeflow.training.pieces import Fitted, fit_pieces
from latticeflow.training.pipeline import run_pipeline
from latticeflow.training.samples import held_out_split
from latticeflow.training.score import SCORE_LOSSES, make_score_loss
from latticeflow.training.trainer import StepRecord, Trainer, TrainingError, TrainingSettings, hopeless, train

__all__ = [
    "ESTIMATORS",
    "SCORE_LOSSES",
    "FitRecord",
    "Fitted",
    "LikelihoodSettings",
    "LostProcessError",
    "StepRecord",
    "Trainer",
    "TrainingError",
    "TrainingSettings",
    "WeightAverage",
    "fit",
    "fit_pieces",
    "held_out_split",
    "hopeless",
    "make_estimator",
    "make_score_loss",
    "run_pipeline",
    "train",
]
