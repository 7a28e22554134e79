"""Theories by what they have in common, named by their `kind`."""

GAUGE_THEORIES = ("u1", "schwinger")
PLANAR_DENSITIES = ("two_moons", "circle_of_gaussians", "two_rings")
DENSITIES = {
    "funnel": 2,
    "student_t": 1,
    "mixture": 2,
    **dict.fromkeys(PLANAR_DENSITIES, 2),
    "linear_regression": 2,
    "horseshoe": 4,
}
"""The smallest dimension of each density; that of a planar one is 2."""
DRAWABLE = ("funnel", "student_t", "mixture", *PLANAR_DENSITIES)
"""The densities with exact independent draws."""
PRIORS = {
    "haar": GAUGE_THEORIES,
    "quenched": GAUGE_THEORIES,
    "normal": ("scalar", *DENSITIES),
    "free_field": ("scalar",),
    "student_t": ("scalar", *DENSITIES),
}
"""The theories whose fields each prior draws."""
