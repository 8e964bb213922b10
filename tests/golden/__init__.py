"""Basins as released versions wrote them. They are never written again: what reads them must go on reading them."""
