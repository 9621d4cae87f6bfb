"""Samplers: the model on this machine, or another engine or server."""
