"""Simulated studies with a known truth: anatomy, scanner, scenario. NumPy alone; no torch, no training."""
