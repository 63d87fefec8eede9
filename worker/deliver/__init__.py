"""Sending results to destinations and asking them to keep what they took (PS3.4 annexes B and J)."""
