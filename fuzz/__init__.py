"""Fuzz targets: `fuzz_<name>.py`, one per decoder, each with its seeds in `corpus/<name>/`.

A target is a module with a function `one_input(data)` that decodes `data`. Raising a `BasinError` is a right answer;
what decodes must also hold what the decoder promises. `driver.py` runs a target under atheris.
"""
