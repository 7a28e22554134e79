"""Training: gradient estimators of the Kullback-Leibler and Fisher divergences with their loop, and fits to samples."""

from latticeflow.training.averaging import WeightAverage
from latticeflow.training.data_parallel import run_data_parallel
from latticeflow.training.estimators import ESTIMATORS, make_estimator
from latticeflow.training.exchange import LostProcessError
from latticeflow.training.likelihood import FitRecord, LikelihoodSettings, fit
from latticeflow.training.pieces import Fitted, fit_pieces
from latticeflow.training.pipeline import run_pipeline
from latticeflow.training.samples import held_out_split
from latticeflow.training.score import SCORE_LOSSES, make_score_loss
from latticeflow.training.team import Team
from latticeflow.training.trainer import StepRecord, Trainer, TrainingError, TrainingSettings, hopeless, train

__all__ = [
    "ESTIMATORS",
    "SCORE_LOSSES",
    "FitRecord",
    "Fitted",
    "LikelihoodSettings",
    "LostProcessError",
    "StepRecord",
    "Team",
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
    "run_data_parallel",
    "run_pipeline",
    "train",
]
