"""Fuzz targets: `fuzz_<name>.py`, one per decoder, each with its seeds in `corpus/<name>/`.

A target is a module with two functions. `one_input(data)` decodes `data`; raising a `BasinError` is a right answer, and
what decodes must hold what the decoder promises. `seeds()` gives the valid inputs that the corpus starts from, as the
code encodes them now; `python -m fuzz.driver --write-seeds` stores them. `driver.py` runs a target under atheris, and
`tests/test_fuzz.py` replays every corpus.
"""
