"""The engine: state, log, strata, names, contents. Uses `basin.format` and `basin.storage`; knows no layer."""
