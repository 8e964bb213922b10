"""Fuzz targets: `fuzz_<name>.py`, one per decoder, each with its seeds in `corpus/<name>/`.

A target is a module with a function `one_input(data)` that decodes `data` and lets only `basin.errors.BasinError` pass
silently; it ends with `if __name__ == "__main__": run(one_input)`. `tests/test_fuzz.py` replays every corpus.
"""
