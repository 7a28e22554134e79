"""Checks between keys of samplers in pieces, as in `latticeflow.config.checks`."""

from collections.abc import Mapping
from typing import Any

from latticeflow.config.families import DENSITIES, GAUGE_THEORIES
from latticeflow.config.problems import Problem, alternatives, refused, written
from latticeflow.training.estimators import SCORE_ESTIMATORS

PIECES = {"charge": GAUGE_THEORIES, "sign": ("scalar",), "clusters": ("scalar", *DENSITIES)}
OF_CLUSTERS = ("clusters", "most_clusters", "smallest_cluster", "clusterer", "neighbourhood", "noise")
OF_FITS = ("validation", "patience", "evaluate_every", "processes")
OF_STEPS = {"accumulate": 1, "betas": (0.9, 0.99), "warmup": 50, "window": 50, "checkpoint_every": 200}
"""What only training by gradient steps has, with the defaults, which are not seen to be given or not."""

Values = Mapping[str, Any]


def pieces_theory(values: Values) -> list[Problem]:
    """The pieces are those of an order parameter that the theory has."""
    theory, pieces = values["action.kind"], values["sampler.pieces"]
    fitting = [name for name, theories in PIECES.items() if theory in theories]
    if pieces in fitting:
        return []
    expected = f"{alternatives(fitting)} for action.kind = {written(theory)}"
    return [Problem("sampler.pieces", expected, written(pieces))]


def pieces_wells(values: Values) -> list[Problem]:
    """The signs of the magnetisation are pieces where the potential has two wells."""
    m2, lam = values["action.m2"], values["action.lam"]
    if values["sampler.pieces"] != "sign" or (m2 < 0 < lam):
        return []
    path, found = ("action.m2", m2) if m2 >= 0 else ("action.lam", lam)
    expected = f'number {"< 0" if m2 >= 0 else "> 0"} for sampler.pieces = "sign" (a potential with two wells)'
    return [Problem(path, expected, written(found))]


def pieces_vacuum(values: Values) -> list[Problem]:
    """Only the signs of the magnetisation have a vacuum to start from."""
    pieces, vacuum = values["sampler.pieces"], values["sampler.vacuum"]
    if pieces == "sign" or vacuum is None:
        return []
    expected = f'no such key for sampler.pieces = {written(pieces)} (only "sign" has it)'
    return [Problem("sampler.vacuum", expected, written(vacuum))]


def pieces_kernels(values: Values) -> list[Problem]:
    """HMC in a latent space needs a single one."""
    kernels = values["chain.kernels"]
    if values["sampler.pieces"] == "charge" or "flow_hmc" not in kernels:
        return []
    expected = 'no "flow_hmc" for sampler.kind = "piecewise" (each piece has a latent space of its own)'
    return [Problem("chain.kernels", expected, written(kernels))]


def pieces_prior(values: Values) -> list[Problem]:
    """Sectors have weights of their own, which a sector factor would be the same as."""
    if values["sampler.pieces"] != "charge":
        return []
    prior = values["sampler.prior.kind"]
    if prior != "quenched":
        return [Problem("sampler.prior.kind", '"quenched" for sampler.pieces = "charge"', written(prior))]
    problems = []
    if values["sampler.prior.sector"]:
        problems.append(
            Problem("sampler.prior.sector", '0 for sampler.pieces = "charge"', written(values["sampler.prior.sector"]))
        )
    if values["sampler.prior.smooth_sector"]:
        problems.append(
            Problem(
                "sampler.prior.smooth_sector",
                'nothing for sampler.pieces = "charge"',
                written(values["sampler.prior.smooth_sector"]),
            )
        )
    return problems


def pieces_score(values: Values) -> list[Problem]:
    """The density of a mixture of mirror images has no energy of its own."""
    estimator = values["training.estimator"]
    if values["sampler.pieces"] != "sign" or estimator not in SCORE_ESTIMATORS:
        return []
    expected = 'an estimator of a Kullback-Leibler divergence for sampler.pieces = "sign" (scores are of one flow)'
    return [Problem("training.estimator", expected, written(estimator))]


def cluster_keys(values: Values) -> list[Problem]:
    """Charges and signs are pieces by themselves."""
    pieces = values["sampler.pieces"]
    if pieces == "clusters":
        return []
    expected = f'no such key with sampler.pieces = {written(pieces)} (only "clusters" is cut by clustering)'
    return list(refused(values, "sampler", OF_CLUSTERS, expected))


def clusterer_keys(values: Values) -> list[Problem]:
    """K-means finds the number of clusters or is given it, a Gaussian mixture is given it, DBSCAN finds it."""
    if values["sampler.pieces"] != "clusters":
        return []
    clusterer, clusters = values["sampler.clusterer"], values["sampler.clusters"]
    name, problems = written(clusterer), []
    others = ("neighbourhood", "noise") if clusterer != "dbscan" else ("clusters", "most_clusters")
    problems += refused(values, "sampler", others, f"no such key with sampler.clusterer = {name}")
    if clusterer == "gaussian_mixture" and clusters is None:
        problems.append(Problem("sampler.clusters", f"integer >= 1 for sampler.clusterer = {name}", "nothing"))
    if clusterer == "dbscan" and values["sampler.neighbourhood"] is None:
        problems.append(Problem("sampler.neighbourhood", f"number > 0 for sampler.clusterer = {name}", "nothing"))
    if clusterer != "dbscan" and clusters is not None:
        problems += refused(values, "sampler", ("most_clusters",), "nothing where sampler.clusters is given")
    return problems


def fitted_pieces(values: Values) -> list[Problem]:
    """Clusters are those of samples, which their flows are fitted to; without, there is no sampler."""
    if values["sampler.pieces"] != "clusters":
        return []
    used = bool({"independence", "flow_hmc"} & set(values.get("chain.kernels", ("independence",))))
    if values["training"] is None:
        expected = 'a section [training] with estimator = "forward_kl" for sampler.pieces = "clusters"'
        return [Problem("training", expected, "nothing")] if used else []
    problems, fitted = [], 'for sampler.pieces = "clusters" (flows are fitted to samples)'
    if values["training.estimator"] != "forward_kl":
        problems.append(Problem("training.estimator", f'"forward_kl" {fitted}', written(values["training.estimator"])))
    if used and values["training.steps"] == 0:
        problems.append(Problem("training.steps", f"integer >= 1 {fitted}", "0"))
    return problems


def step_keys(values: Values) -> list[Problem]:
    """A fit has no running averages, no warm-up, and a checkpoint after each piece."""
    if values["sampler.pieces"] != "clusters":
        return []
    expected = 'no such key for sampler.pieces = "clusters" (flows are fitted to samples)'
    given = [key for key, default in OF_STEPS.items() if written(values[f"training.{key}"]) != written(default)]
    return list(refused(values, "training", (*given, "start_from", "fine_tuning_estimator"), expected))


def fit_keys(values: Values) -> list[Problem]:
    """Only the pieces of clusters are fitted with held-out samples."""
    if values.get("sampler.pieces") == "clusters":
        return []
    return list(refused(values, "training", OF_FITS, 'no such key but for sampler.pieces = "clusters"'))


def enough_draws(values: Values) -> list[Problem]:
    """Every cluster has its smallest number of samples."""
    if values["sampler.pieces"] != "clusters" or values["training.draws"] is None:
        return []
    clusters, smallest = values["sampler.clusters"] or 1, values["sampler.smallest_cluster"]
    if values["training.draws"] >= clusters * smallest:
        return []
    expected = f"at least {clusters * smallest} ({clusters} x sampler.smallest_cluster = {smallest})"
    return [Problem("training.draws", expected, written(values["training.draws"]))]


PIECE_CHECKS = (
    pieces_theory,
    pieces_wells,
    pieces_vacuum,
    pieces_kernels,
    pieces_prior,
    pieces_score,
    cluster_keys,
    clusterer_keys,
    fitted_pieces,
    step_keys,
    fit_keys,
    enough_draws,
)
