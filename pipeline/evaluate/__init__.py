"""Judging an adapter: samples, losses, scores, the gate."""
