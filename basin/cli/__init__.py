"""The `basin` command. One file per command group; `main.py` puts them together.

The only place (but `Secret.from_env`) that knows argv, the environment and printing. Nothing in Basin imports it.
"""
