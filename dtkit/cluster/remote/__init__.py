"""Engines on other hosts: an agent on each, started by one of ipyparallel's launchers."""
