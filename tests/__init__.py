"""The tests. Folders mirror the paths of the modules under test; the names of tests say the behaviour."""
