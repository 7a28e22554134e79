"""The sections `[action]`, one per theory or density."""

from typing import Literal

from pydantic import Field

from latticeflow.config.types import Beta, Count, Grid, Natural, NonNegative, Positive, Settings, Several


class U1Settings(Settings):
    """Pure compact U(1) gauge theory in two dimensions."""

    kind: Literal["u1"] = Field(description="pure gauge theory")
    beta: Beta = Field(description="gauge coupling, dimensionless")
    holonomies: Grid = Field((1, 1), description="grid of holonomy shifts averaged over, per direction; [1, 1] is none")


class SchwingerSettings(Settings):
    """The Schwinger model: two-dimensional QED with Wilson fermions."""

    kind: Literal["schwinger"] = Field(description="gauge theory with Wilson fermions")
    beta: Beta = Field(description="gauge coupling, dimensionless")
    kappa: float = Field(ge=0, lt=0.5, description="hopping parameter, dimensionless")
    flavours: Count = Field(2, description="number of degenerate fermion flavours")
    holonomies: Grid = Field((1, 1), description="grid of holonomy shifts averaged over, per direction; [1, 1] is none")


class ScalarSettings(Settings):
    """The scalar field with a quartic coupling."""

    kind: Literal["scalar"] = Field(description="scalar field theory")
    m2: float = Field(description="coefficient of phi^2, lattice units; positive where lam = 0")
    lam: NonNegative = Field(description="coefficient of phi^4, lattice units")


class FunnelSettings(Settings):
    """Neal's funnel: `x_0` normal of mean 0, the other variables normal of variance `exp(x_0)`; log Z = 0."""

    kind: Literal["funnel"] = Field(description="density of [D] variables, D >= 2")
    scale: Positive = Field(3.0, description="standard deviation of x_0")


class StudentTDensitySettings(Settings):
    """The standard multivariate student-t distribution; log Z = 0."""

    kind: Literal["student_t"] = Field(description="density of [D] variables")
    degrees_of_freedom: Positive = Field(1.0, description="degrees of freedom; 1 is the Cauchy distribution")


class MixtureSettings(Settings):
    """Three unit Gaussians at the corners of an equilateral triangle; log Z = 0."""

    kind: Literal["mixture"] = Field(description="density of [D] variables, D >= 2")
    radius: Positive = Field(3.0, description="distance of each Gaussian's centre from the origin")


class TwoMoonsSettings(Settings):
    """Two crescents, left and right on a circle; log Z is known."""

    kind: Literal["two_moons"] = Field(description="density of [2] variables")


class CircleOfGaussiansSettings(Settings):
    """Equal Gaussians on a circle, six widths apart; log Z = 0."""

    kind: Literal["circle_of_gaussians"] = Field(description="density of [2] variables")
    modes: Several = Field(8, description="number of Gaussians")
    radius: Positive = Field(2.0, description="distance of each Gaussian's centre from the origin")


class TwoRingsSettings(Settings):
    """Two concentric rings of radius 1 and 2; log Z is known."""

    kind: Literal["two_rings"] = Field(description="density of [2] variables")


class RegressionSettings(Settings):
    """Conjugate linear regression with D - 1 coefficients and the variance of the noise; log Z is known."""

    kind: Literal["linear_regression"] = Field(description="density of [D] variables, D >= 2")
    observations: Count = Field(100, description="observations of the synthetic data")
    data_seed: Natural = Field(0, description="seed of the synthetic data")


class HorseshoeSettings(Settings):
    """Logistic regression with a horseshoe prior of D/2 - 1 coefficients."""

    kind: Literal["horseshoe"] = Field(description="density of [D] variables, D even, D >= 4")
    data: Literal["synthetic", "breast_cancer"] = Field(
        "synthetic", description="synthetic, or the breast cancer data of scikit-learn, for which D = 62"
    )
    observations: Count = Field(100, description="observations of the synthetic data")
    data_seed: Natural = Field(0, description="seed of the synthetic data")


LatticeTheory = U1Settings | SchwingerSettings | ScalarSettings
PlanarDensity = TwoMoonsSettings | CircleOfGaussiansSettings | TwoRingsSettings
Density = (
    FunnelSettings | StudentTDensitySettings | MixtureSettings | PlanarDensity | RegressionSettings | HorseshoeSettings
)
