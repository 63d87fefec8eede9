"""Simulated studies with a known truth: anatomy, scanner, scenario. No torch, no training."""
