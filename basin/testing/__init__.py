"""Tools to test a storage and what stands on it: simulated disk, crash explorer, faults, conformance suite.

Shipped for everybody who writes a storage or a layer. Product code never imports this package.
"""
