"""Layers on the engine: everything a user stores is ordinary names and linked grains. They use its public names only."""
