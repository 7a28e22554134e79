"""Lattice field theory ensembles from normalizing flows and exact accept/reject chains."""

__version__ = "0.1.0"
