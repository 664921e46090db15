"""The claim of similarity that is no inequality between arms."""

from brickyard.checks._rho_curve import rho_curve

__all__ = ["rho_curve"]
