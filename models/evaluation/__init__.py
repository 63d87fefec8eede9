"""Measuring a network against known truth: metrics, ablations, figures. Needs no torch."""
