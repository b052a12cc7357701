"""Hosts on one machine, for tests and benchmarks: networks, and the servers that run on them."""
