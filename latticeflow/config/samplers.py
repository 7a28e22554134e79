"""The section `[sampler]`: priors, flows, and the kinds of samplers that are made of them."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from latticeflow.config.types import (
    Beta,
    Count,
    Counts,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Settings,
    Several,
    SmoothSector,
    odd,
)


class HaarSettings(Settings):
    """Independent uniform links."""

    kind: Literal["haar"] = Field(description="Haar measure of every link")


class QuenchedSettings(Settings):
    """Exact independent draws of the pure gauge theory."""

    kind: Literal["quenched"] = Field(description="exact quenched U(1)")
    beta: Beta | None = Field(None, description="gauge coupling of the prior, dimensionless (absent: the action's)")
    sector: NonNegative = Field(0.0, description="c in the sector factor exp(-c Q^2), dimensionless")
    smooth_sector: SmoothSector = Field(
        (), description="pairs [a, c]: smooth sector factor sum of a exp(-c R^2), the weights a adding up to 1"
    )


class NormalSettings(Settings):
    """Independent normal variables at every site."""

    kind: Literal["normal"] = Field(description="normal distribution of mean 0")
    scale: Positive = Field(1.0, description="standard deviation, in units of the field")


class FreeFieldSettings(Settings):
    """Exact independent draws of the free scalar field."""

    kind: Literal["free_field"] = Field(description="Gaussian field with the propagator 1 / (2 (m2 + khat^2))")
    m2: Positive = Field(description="coefficient of phi^2, lattice units")


class StudentTSettings(Settings):
    """Independent student-t variables at every site, with trainable degrees of freedom."""

    kind: Literal["student_t"] = Field(description="student-t distribution of location 0 and scale 1")
    degrees_of_freedom: Positive = Field(30.0, description="degrees of freedom before training")
    sites: Literal["own", "shared"] = Field("own", description="degrees of freedom of every site, or one for all")


class GaugeFlowSettings(Settings):
    """Gauge-equivariant plaquette couplings; the extents must be multiples of 4."""

    kind: Literal["gauge"] = Field(description="plaquette couplings")
    layers: Count = Field(8, description="number of couplings; 8 update every link once")
    bins: int = Field(6, ge=2, le=64, description="bins of each circular spline")
    hidden: Counts = Field((64, 64), description="channels of the conditioner's hidden layers")
    conditioner: Literal["global", "local"] = Field(
        "global", description="first layer sees all mask cells, the others one each; or convolutions throughout"
    )
    kernel: Annotated[Count, AfterValidator(odd)] = Field(
        3, description="side of the convolutions of a local conditioner, in mask cells"
    )
    dilations: Counts | None = Field(
        None, description="dilation of each local convolution, in mask cells, one more than hidden (absent: all 1)"
    )
    polyakov: bool = Field(
        False, description="the conditioner also sees frozen Polyakov loops; not with averages over holonomies"
    )
    holonomy_pairs: Natural = Field(
        0,
        description="pairs of holonomy couplings, one per direction, after every 8 layers and the last; not with "
        "averages over holonomies",
    )


class IdentitySettings(Settings):
    """No flow: the prior itself proposes, and there is nothing to train."""

    kind: Literal["identity"] = Field(description="no flow")


class Couplings(Settings):
    """Keys of couplings of real fields, which several sections share."""

    layers: Count = Field(32, description="number of couplings; two update every site once")
    mask: Literal["checkerboard", "stripes", "random"] = Field(
        "checkerboard",
        description='which half of the sites a coupling updates, the other half in turn; "random" for densities',
    )
    transform: Literal["affine", "spline"] = Field(
        "affine", description="map of each site: affine, or a rational-quadratic spline with linear tails, then affine"
    )
    bins: int = Field(8, ge=2, le=64, description="bins of each spline")
    bound: Positive = Field(3.0, description="the splines act between -bound and bound, in units of the latent field")
    clamp: Literal["asymmetric", "symmetric", "tanh", "none"] = Field(
        "asymmetric", description="soft clamp of the couplings' log scales"
    )
    clamp_positive: Positive = Field(0.1, description="largest log scale of the asymmetric clamp")
    clamp_negative: Positive = Field(2.0, description="minus the smallest log scale, on both sides of other clamps")
    conditioner: Literal["convolution", "dense"] = Field(
        "convolution",
        description='network that reads the frozen sites: the same everywhere, or all of them; "dense" for densities',
    )
    hidden: Counts = Field((64,), description="channels of the conditioner's hidden layers")
    kernel: Annotated[Count, AfterValidator(odd)] = Field(3, description="side of the first convolution, in sites")
    inner_kernel: Annotated[Count, AfterValidator(odd)] = Field(1, description="side of the others, in sites")
    symmetry: Literal["none", "z2"] = Field("none", description='"z2": the flow commutes with phi -> -phi')


class CouplingFlowSettings(Couplings):
    """Couplings of real fields on site masks (RealNVP, spline flows)."""

    kind: Literal["coupling"] = Field(description="couplings of real fields")


class AutoregressiveFlowSettings(Settings):
    """Masked autoregressive flow of real fields (arXiv:1705.07057); the variables in row-major order, then reversed."""

    kind: Literal["autoregressive"] = Field(description="masked autoregressive flow of real fields")
    blocks: Count = Field(6, description="number of MADE blocks, each of which moves every variable")
    hidden: Counts = Field((50, 50), description="units of each block's hidden layers")
    activation: Literal["tanh", "relu", "elu", "gelu", "silu", "softplus"] = Field(
        "tanh", description="function of the hidden units"
    )


class LinearFlowSettings(Settings):
    """Linear maps of all variables with an activation between each two; from data to latent `W, s, W, ..., W`."""

    kind: Literal["linear"] = Field(description="linear maps and activations")
    layers: Count = Field(2, description="number of linear maps; one alone is a Gaussian")
    linear: Literal["dense", "lu", "convolution"] = Field(
        "dense", description="any matrix, one in triangular factors, or a convolution with periodic boundaries"
    )
    kernel: Annotated[Count, AfterValidator(odd)] | None = Field(
        None, description="side of a convolution's window, in sites (absent: the whole lattice)"
    )
    activation: Literal["leaky_relu", "cubic"] = Field(
        "leaky_relu", description="smooth leaky ReLU, or z = x + c x^3 with trainable c"
    )
    slope: Fraction = Field(0.3, description="smallest slope of the leaky ReLU")
    symmetry: Literal["none", "z2"] = Field(
        "none", description='"z2": the flow commutes with phi -> -phi; "cubic" activation only'
    )


class GlowFlowSettings(Settings):
    """Multi-scale Glow with periodic convolutions (arXiv:1807.03039); two extents, multiples of 2^levels."""

    kind: Literal["glow"] = Field(description="Glow, for real fields in two dimensions")
    levels: Annotated[int, Field(ge=1, le=16)] = Field(2, description="scales; at each, half of the variables are done")
    steps: Count = Field(4, description="normalisation, 1x1 convolution and coupling at each level, so many times")
    hidden: Count = Field(32, description="channels of the couplings' networks")


Flow = (
    GaugeFlowSettings
    | CouplingFlowSettings
    | AutoregressiveFlowSettings
    | LinearFlowSettings
    | GlowFlowSettings
    | IdentitySettings
)
Prior = HaarSettings | QuenchedSettings | NormalSettings | FreeFieldSettings | StudentTSettings


class FlowSamplerSettings(Settings):
    """A flow on top of a prior."""

    kind: Literal["flow"] = Field("flow", description="kind of sampler")
    prior: Prior = Field(
        discriminator="kind",
        description='The base distribution. Absent: "quenched" for gauge theories, "student_t" for a stabilised '
        'sampler, else "normal".',
    )
    flow: Flow = Field(
        discriminator="kind",
        description='The bijection applied to the prior\'s draws. Absent: "linear" for an energy-based flow, else '
        '"identity".',
    )


class PiecewiseSamplerSettings(Settings):
    """A flow for each piece of field space (arXiv:2305.02930)."""

    kind: Literal["piecewise"] = Field(description="mixture of flows, each on a piece of field space")
    pieces: Literal["charge", "sign", "clusters"] = Field(
        description='"charge": topological sectors of a gauge theory; "sign": the two signs of the magnetisation; '
        '"clusters": clusters of samples, of a lattice field by its magnetisation, of a density by all variables'
    )
    clusters: Count | None = Field(
        None, description='number of clusters (absent: that of the largest silhouette score); "clusters" only, as below'
    )
    most_clusters: Several | None = Field(
        None, description="largest number of clusters tried where clusters is absent, K-means only (absent: 20)"
    )
    smallest_cluster: Count | None = Field(
        None, description="samples that every cluster has to have (absent: 100); the search goes on to fewer clusters"
    )
    clusterer: Literal["kmeans", "gaussian_mixture", "dbscan"] | None = Field(
        None, description='what cuts the samples (absent: "kmeans"); a Gaussian mixture needs clusters'
    )
    neighbourhood: Positive | None = Field(
        None, description="DBSCAN's distance between neighbours, in units of the field; required for DBSCAN, only there"
    )
    noise: Literal["refuse", "nearest"] | None = Field(
        None,
        description='samples that DBSCAN puts into no cluster: an error, or to the nearest centre (absent: "refuse")',
    )
    vacuum: Positive | None = Field(
        None,
        description='for "sign": mean field of the positive piece before training (absent: the classical minimum)',
    )
    prior: Prior = Field(
        discriminator="kind",
        description='The base distribution of every piece: "quenched" without sector factors for "charge".',
    )
    flow: Flow = Field(
        discriminator="kind",
        description='The bijection of every piece, one network for all; for "clusters" one each, after which an affine '
        "map puts it on its samples.",
    )


class StabilisedSamplerSettings(Couplings):
    """Couplings with soft clamps, then LOFT, then an elementwise affine map (arXiv:2402.16408)."""

    kind: Literal["stabilised"] = Field(description="stabilised deep flow of a real field")
    prior: Prior = Field(discriminator="kind", description="The base distribution.")
    tau: Positive = Field(100.0, description="where LOFT begins to compress, in units of the field before the last map")
    sites: Literal["own", "shared"] = Field("own", description="scale and shift of every site, or one for all")


class EBFlowSamplerSettings(Settings):
    """A flow with linear layers, read as an energy-based model (arXiv:2305.15267)."""

    kind: Literal["ebflow"] = Field(description="energy-based flow of a real field")
    prior: Prior = Field(discriminator="kind", description="The base distribution.")
    flow: Flow = Field(discriminator="kind", description='A bijection with linear layers. Absent: "linear".')
