"""Samplers whose pieces are clusters: their keys, what is refused, and what is built."""

import pytest
import torch

from latticeflow.actions import ScalarAction, TwoMoons
from latticeflow.config import Config, ConfigError
from latticeflow.config.building import build_bare_action, build_sampler, build_trainer
from latticeflow.config.clusters import build_piece, build_pieces, cut, fit_settings, order_parameters
from latticeflow.config.loading import parse_config
from latticeflow.config.piece_checks import OF_CLUSTERS, OF_FITS, OF_STEPS
from latticeflow.config.samples import check_samples, random_choice, training_fields
from latticeflow.config.schema import TrainingSettings
from latticeflow.flows import ElementwiseAffine, MaskedAutoregressive
from latticeflow.priors import Normal
from latticeflow.samplers import PiecewiseSampler
from latticeflow.storage import DataError

MOONS = """
[lattice]
shape = [2]
[action]
kind = "two_moons"
[sampler]
kind = "piecewise"
pieces = "clusters"
[sampler.flow]
kind = "autoregressive"
blocks = 2
hidden = [4]
[training]
estimator = "forward_kl"
draws = 400
"""
PHI4 = '[lattice]\nshape = [4, 4]\n[action]\nkind = "scalar"\nm2 = -4\nlam = 4.5\n'
SIGN = '[sampler]\nkind = "piecewise"\npieces = "sign"\n[sampler.flow]\nkind = "coupling"\n'
PLAIN = '[sampler.flow]\nkind = "coupling"\n'
LATTICE = MOONS.replace("draws = 400", 'samples = "e.h5"').partition("[sampler]")
LATTICE = PHI4 + "[sampler]" + LATTICE[2]
GAUSSIANS = ["sampler.clusterer=gaussian_mixture", "sampler.clusters=2"]
DBSCAN = ["sampler.clusterer=dbscan", "sampler.neighbourhood=0.3"]


def only(found, path):
    """Return the problem of a key, which must be the only one."""
    assert list(found) == [path]
    return found[path]


def fields(config):
    return training_fields(config, build_bare_action(config))


# ---------------------------------------------------------------- defaults


def test_defaults_are_filled_in_and_shown():
    config = parse_config(MOONS)
    chosen = config.sampler.model_dump(include=OF_CLUSTERS, exclude_none=True)
    assert chosen == {"most_clusters": 20, "smallest_cluster": 100, "clusterer": "kmeans"}
    fits = config.training.model_dump(include=OF_FITS)
    assert fits == {"validation": 0.2, "patience": 10, "evaluate_every": 50, "processes": 1}
    assert config.sampler.prior.kind == "normal"
    assert config.clustered
    assert "most_clusters = 20" in config.to_toml()


@pytest.mark.parametrize(("overrides", "own"), [(GAUSSIANS, {}), (DBSCAN, {"noise": "refuse"})])
def test_defaults_are_those_of_the_clusterer(overrides, own):
    chosen = parse_config(MOONS, overrides).sampler.model_dump(include=OF_CLUSTERS, exclude_none=True)
    given = {key.removeprefix("sampler."): value for key, value in (change.split("=") for change in overrides)}
    assert {name: str(value) for name, value in chosen.items()} == {"smallest_cluster": "100", **given, **own}


@pytest.mark.parametrize("text", [PHI4 + SIGN, PHI4 + PLAIN])
def test_others_have_none_of_these_keys(text):
    config = parse_config(text + "[training]\n")
    assert not config.clustered
    assert not any(f"{key} =" in config.to_toml() for key in (*OF_CLUSTERS, *OF_FITS))


@pytest.mark.parametrize(
    "overrides", [[], ["sampler.clusters=3"], GAUSSIANS, DBSCAN, [*DBSCAN, "sampler.noise=nearest"]]
)
def test_round_trip(overrides):
    config = parse_config(MOONS, overrides)
    assert parse_config(config.to_toml()) == config
    assert parse_config(config.to_toml()).to_toml() == config.to_toml()


def test_settings_made_in_python_get_the_same_defaults():
    read = parse_config(MOONS)
    sections = {name: getattr(read, name) for name in ("lattice", "action", "training")}
    sampler = read.sampler.model_copy(update={"clusterer": None, "most_clusters": None, "smallest_cluster": None})
    assert Config(**sections, sampler=sampler) == read
    with pytest.raises(ConfigError, match=r"sampler\.neighbourhood"):
        Config(**sections, sampler=sampler.model_copy(update={"clusterer": "dbscan"}))


# ---------------------------------------------------------------- what is refused


WRONG = {
    "sampler.pieces": (['"cluster"', "1"], '"charge", "sign" or "clusters"'),
    "sampler.clusters": (["0", "2.0", "true"], "integer >= 1"),
    "sampler.most_clusters": (["1", '"all"'], "integer >= 2"),
    "sampler.smallest_cluster": (["0", "100.5"], "integer >= 1"),
    "sampler.clusterer": (['"k-means"', "2"], '"kmeans", "gaussian_mixture" or "dbscan"'),
    "sampler.neighbourhood": (["0", "-0.1", "inf"], "number > 0"),
    "sampler.noise": (['"drop"', "true"], '"refuse" or "nearest"'),
    "training.draws": (["1", "50.5"], "integer >= 2"),
    "training.validation": (["0", "1", "nan"], "number > 0 and < 1"),
    "training.patience": (["0", "2.5"], "integer >= 1"),
    "training.evaluate_every": (["0"], "integer >= 1"),
    "training.processes": (["0", "5000"], "integer from 1 to 4096"),
}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [(path, value, expected) for path, (values, expected) in WRONG.items() for value in values],
)
def test_wrong_values_are_named(problems, path, value, expected):
    overrides = DBSCAN if path.endswith(("neighbourhood", "noise")) else []
    problem = only(problems(MOONS, *overrides, f"{path}={value}"), path)
    assert (problem.expected, problem.found) == (expected, value)


VALUES = {
    **{"clusters": "2", "most_clusters": "5", "smallest_cluster": "50"},
    **{"clusterer": "kmeans", "neighbourhood": "0.1", "noise": "nearest"},
}


@pytest.mark.parametrize("key", OF_CLUSTERS)
def test_charges_and_signs_are_not_clustered(problems, key):
    problem = only(problems(PHI4 + SIGN, f"sampler.{key}={VALUES[key]}"), f"sampler.{key}")
    assert problem.expected == 'no such key with sampler.pieces = "sign" (only "clusters" is cut by clustering)'


@pytest.mark.parametrize("key", OF_CLUSTERS)
def test_other_samplers_are_told_where_the_key_belongs(problems, key):
    problem = only(problems(PHI4 + PLAIN, f"sampler.{key}={VALUES[key]}"), f"sampler.{key}")
    assert '[sampler] of kind "piecewise"' in problem.suggestion


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        (["sampler.neighbourhood=0.1"], "sampler.neighbourhood", 'no such key with sampler.clusterer = "kmeans"'),
        (["sampler.noise=nearest"], "sampler.noise", 'no such key with sampler.clusterer = "kmeans"'),
        (["sampler.clusters=3", "sampler.most_clusters=4"], "sampler.most_clusters", "nothing where sampler.clusters"),
        (GAUSSIANS[:1], "sampler.clusters", 'integer >= 1 for sampler.clusterer = "gaussian_mixture"'),
        ([*GAUSSIANS, "sampler.most_clusters=4"], "sampler.most_clusters", "nothing where sampler.clusters is given"),
        ([*GAUSSIANS, "sampler.noise=nearest"], "sampler.noise", "no such key"),
        (DBSCAN[:1], "sampler.neighbourhood", 'number > 0 for sampler.clusterer = "dbscan"'),
        ([*DBSCAN, "sampler.clusters=2"], "sampler.clusters", 'no such key with sampler.clusterer = "dbscan"'),
        ([*DBSCAN, "sampler.most_clusters=9"], "sampler.most_clusters", "no such key"),
    ],
)
def test_keys_of_another_clusterer_are_refused(problems, overrides, path, expected):
    assert only(problems(MOONS, *overrides), path).expected.startswith(expected)


@pytest.mark.parametrize("key", OF_FITS)
@pytest.mark.parametrize("text", [PHI4 + SIGN, PHI4 + PLAIN])
def test_only_pieces_are_fitted(problems, text, key):
    value = {"validation": "0.2", "patience": "10", "evaluate_every": "50", "processes": "1"}[key]
    problem = only(problems(text + "[training]\n", f"training.{key}={value}"), f"training.{key}")
    assert problem.expected == 'no such key but for sampler.pieces = "clusters"'


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("accumulate", "2"), ("betas", "[0.9, 0.999]"), ("warmup", "0"), ("window", "10")),
        *(("checkpoint_every", "10"), ("start_from", '"runs/a"')),
    ],
)
def test_keys_of_gradient_steps_are_refused(problems, key, value):
    problem = only(problems(MOONS, f"training.{key}={value}"), f"training.{key}")
    assert problem.expected.startswith('no such key for sampler.pieces = "clusters"')
    assert problem.found == value


def test_the_defaults_of_gradient_steps_are_those_of_the_schema():
    assert {key: TrainingSettings.model_fields[key].default for key in OF_STEPS} == OF_STEPS


@pytest.mark.parametrize("estimator", ["path", "reinforce", "reparametrisation"])
def test_clusters_are_learnt_from_samples(problems, estimator):
    found = problems(MOONS, f"training.estimator={estimator}")
    assert set(found) == {"training.estimator", "training.draws"}
    assert found["training.estimator"].expected.startswith('"forward_kl" for sampler.pieces = "clusters"')


def test_clusters_need_a_training_where_the_chain_uses_them(problems):
    untrained = MOONS.partition("[training]")[0]
    assert only(problems(untrained), "training").found == "nothing"
    assert only(problems(MOONS, "training.steps=0"), "training.steps").expected.startswith("integer >= 1")
    for text in (untrained, MOONS + "steps = 0\n"):
        assert parse_config(text, ['chain.kernels=["hmc"]']).clustered


def test_there_is_no_single_latent_space(problems):
    assert list(problems(MOONS, 'chain.kernels=["flow_hmc"]')) == ["chain.kernels"]


@pytest.mark.parametrize(
    ("overrides", "least"),
    [(["training.draws=99"], 100), (["sampler.clusters=5"], 500), (["sampler.smallest_cluster=401"], 401)],
)
def test_too_few_draws_for_the_clusters(problems, overrides, least):
    assert only(problems(MOONS, *overrides), "training.draws").expected.startswith(f"at least {least} (")


@pytest.mark.parametrize(
    ("text", "pieces", "fitting"),
    [
        (MOONS, "sign", '"clusters" for action.kind = "two_moons"'),
        (PHI4 + SIGN, "charge", '"sign" or "clusters" for action.kind = "scalar"'),
    ],
)
def test_pieces_of_another_theory(problems, text, pieces, fitting):
    found = problems(text, f"sampler.pieces={pieces}")
    assert found["sampler.pieces"].expected == fitting


def test_links_are_cut_by_their_charge(problems):
    text = '[lattice]\nshape = [8, 8]\n[action]\nkind = "u1"\nbeta = 2\n[sampler]\nkind = "piecewise"\n'
    found = problems(text, "sampler.pieces=clusters", 'chain.kernels=["hmc"]')
    assert only(found, "sampler.pieces").expected == '"charge" for action.kind = "u1"'


def test_the_identity_is_fitted_too():
    """The affine map behind it has parameters: a mixture of Gaussians."""
    config = parse_config(MOONS, ['sampler.flow={kind = "identity"}'])
    assert [name for name, _ in build_piece(config).named_parameters()] == [
        "flow.layers.1.log_scale",
        "flow.layers.1.shift",
    ]


# ---------------------------------------------------------------- what is built


def test_draws_are_of_the_density_and_the_seed():
    config = parse_config(MOONS)
    x = fields(config)
    assert x.shape == (400, 2)
    assert x.dtype == torch.float64
    assert torch.equal(x, fields(config))
    assert not torch.equal(x, fields(parse_config(MOONS, ["run.seed=1"])))
    assert float(TwoMoons()(x).mean()) == pytest.approx(1.0, abs=0.3)


def test_order_parameters():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    assert order_parameters(TwoMoons(), x) is x
    phi = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(order_parameters(ScalarAction(-4.0, 4.5), phi), phi.mean((1, 2)))


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
@pytest.mark.parametrize(
    ("overrides", "pieces"),
    [
        ([], 2),
        (["sampler.clusters=3"], 3),
        (["sampler.clusters=1"], 1),
        (["sampler.clusterer=gaussian_mixture", "sampler.clusters=3"], 3),
        ([*DBSCAN, "sampler.neighbourhood=0.8", "sampler.noise=nearest"], 2),
    ],
)
def test_samples_are_cut_as_configured(overrides, pieces, seed):
    config = parse_config(MOONS, [f"run.seed={seed}", "training.draws=600", "sampler.smallest_cluster=40", *overrides])
    x = fields(config)
    found = cut(config, build_bare_action(config), x)
    assert found.pieces == pieces
    assert torch.equal(found.labels, cut(config, build_bare_action(config), x).labels)
    if pieces == 2:
        sides = [float((x[found.labels == k, 0] > 0).double().mean()) for k in range(2)]
        assert sorted(sides) == [0.0, 1.0]


def test_the_largest_number_tried_is_configured():
    config = parse_config(MOONS, ["sampler.most_clusters=4"])
    assert set(cut(config, build_bare_action(config), fields(config)).silhouettes) == {2, 3, 4}


def test_lattice_fields_are_cut_by_their_magnetisation():
    """Noise with two mean values: what differs most from field to field is not what they are cut by."""
    config = parse_config(LATTICE, ["sampler.smallest_cluster=20"])
    generator = torch.Generator().manual_seed(1)
    sign = torch.randint(2, (200,), generator=generator) * 2.0 - 1
    phi = 4 * torch.randn(200, 4, 4, generator=generator)
    phi += (0.8 * sign + 0.1 * torch.randn(200, generator=generator) - phi.mean((1, 2)))[:, None, None]
    found = cut(config, build_bare_action(config), phi.double())
    assert found.pieces == 2
    assert abs(float(((found.labels * 2 - 1) * sign).sum())) == 200


def test_a_piece_is_put_on_its_samples():
    config = parse_config(MOONS, ["training.dtype=float64"])
    x = fields(config)
    piece = build_piece(config, x[x[:, 0] > 0])
    *blocks, affine = [*piece.flow.layers[0].layers, piece.flow.layers[1]]
    assert [type(block) for block in blocks] == [MaskedAutoregressive] * 2
    assert isinstance(affine, ElementwiseAffine)
    assert isinstance(piece.prior, Normal)
    torch.testing.assert_close(affine.shift.detach(), x[x[:, 0] > 0].mean(0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pieces_are_built_again_from_their_weights(dtype):
    config = parse_config(MOONS, [f"training.dtype={dtype}"])
    x = fields(config)
    made = [build_piece(config, x[:300]), build_piece(config, x[300:])]
    state = torch.random.get_rng_state()
    sampler = build_pieces(config, [piece.state_dict() for piece in made], [300, 100])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(sampler, PiecewiseSampler)
    assert {parameter.dtype for parameter in sampler.parameters()} == {getattr(torch, dtype)}
    assert sampler.weights.tolist() == pytest.approx([0.75, 0.25], abs=1e-15)
    for piece, own in zip(sampler.pieces, made, strict=True):
        assert torch.equal(piece.log_prob(x.to(getattr(torch, dtype))), own.log_prob(x.to(getattr(torch, dtype))))


def test_fits_are_configured():
    keys = {"steps": 7, "batch": 30, "learning_rate": 0.02, "validation": 0.3, "patience": 2, "evaluate_every": 3}
    overrides = [f"training.{key}={value}" for key, value in keys.items()]
    overrides += ["training.decay=none", "training.gradient_clip=4.0", "run.seed=9"]
    settings = fit_settings(parse_config(MOONS, overrides))
    whole = {"schedule": "end_to_end", "fine_tuning": 1 / 3, "fine_tuning_rate": None, "learning_rates": None}
    whole |= {"loss": "likelihood", "noise": None, "difference": None, "ema": None}
    assert vars(settings) == {**keys, **whole, "decay": "none", "gradient_clip": 4.0, "seed": 9, "weight_decay": 0.0}


def test_fits_keep_averages_where_they_are_asked_for():
    assert fit_settings(parse_config(MOONS, ["training.ema=0.9"])).ema == 0.9


def test_fits_have_no_steps_by_another_estimator(problems):
    found = problems(MOONS, "training.fine_tuning_estimator=path")
    assert list(found) == ["training.fine_tuning_estimator"]


def test_chains_by_hmc_start_from_the_prior():
    sampler = build_sampler(parse_config(MOONS, ['chain.kernels=["hmc"]']))
    assert isinstance(sampler.prior, Normal)
    assert not list(sampler.parameters())


def test_samples_are_counted_before_anything_is_made():
    config = parse_config(MOONS)
    check_samples(config, build_bare_action(config))
    few = config.model_copy(update={"training": config.training.model_copy(update={"draws": 50})})
    with pytest.raises(DataError, match=r"training\.draws = 50: 50 samples, expected at least 100"):
        check_samples(few, build_bare_action(few))


# ---------------------------------------------------------------- draws for a single flow


FLOW = MOONS.replace('kind = "piecewise"\npieces = "clusters"', 'kind = "flow"')


def test_a_single_flow_learns_from_draws():
    """The likelihood of other draws grows; the loss is a lower bound of `-log Z`, but for the noise of a batch."""
    overrides = ["training.steps=40", "training.warmup=0", "training.learning_rate=0.02", "training.dtype=float64"]
    config = parse_config(FLOW, overrides)
    sampler, others = build_sampler(config), TwoMoons().sample(2000, torch.Generator().manual_seed(5))
    before = float(sampler.log_prob(others).mean().detach())
    trainer = build_trainer(config, sampler)
    trainer.run()
    assert float(sampler.log_prob(others).mean().detach()) > before + 0.2
    assert all(record.loss < -TwoMoons().log_z + 0.5 for record in trainer.records)


def test_batches_are_random_draws():
    x = torch.arange(6.0)[:, None]
    found = random_choice(x)(1000, torch.Generator().manual_seed(3))
    assert sorted(set(found.flatten().tolist())) == [0, 1, 2, 3, 4, 5]
    assert not torch.equal(found[:500], found[500:])
