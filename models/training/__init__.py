"""Simulator, network, training, export and evaluation. Nothing here is needed to process a study."""
