"""Which two series are the pair, how they were acquired, and why, or which named reason stands in the way."""
