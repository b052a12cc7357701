"""What lives on when a kernel does not: a session's record, its guardian, the ending of processes.

Standard library and psutil only: the guardian is a process of its own and small.
"""
