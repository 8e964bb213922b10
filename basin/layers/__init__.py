"""Layers on the engine: what a user stores is ordinary names and linked grains. They use its public names only."""
