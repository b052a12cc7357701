"""Which address of this host is meant by an interface, or leads to another host."""

from __future__ import annotations

import socket

import psutil

from dtkit.errors import InvalidInputError, StartError

__all__ = ["address_of", "address_towards", "interface_with", "only_address", "own_addresses"]

_ANY_PORT = 9


def address_of(interface: str) -> str:
    """Return the IPv4 address of one of this host's interfaces.

    Raises:
        InvalidInputError: there is none of this name, or it has no such address.
    """
    there = own_addresses()
    if interface not in there:
        names = ", ".join(f"{name} ({address})" for name, address in there.items())
        msg = f"--interface {interface}: {socket.gethostname()} has {names or 'none'}"
        raise InvalidInputError(msg)
    return there[interface]


def address_towards(host: str) -> str:
    """Return the address of this host from which packets to another host leave.

    Raises:
        OSError: the other's name is not known, or nothing leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, _ANY_PORT))  # sends nothing: the system only looks for a way
        return str(probe.getsockname()[0])


def only_address() -> str:
    """Return this host's address in the only network that it is in.

    Raises:
        StartError: there are several.
    """
    there = own_addresses()
    found = [address for address in there.values() if not address.startswith("127.")]
    if len(found) == 1:
        return found[0]
    told = ", ".join(f"{name} ({address})" for name, address in there.items())
    msg = f"this host has {told}: say with --interface NAME which leads to the nodes"
    raise StartError(msg)


def interface_with(address: str) -> str:
    """Return the interface of this host that has an address; empty if none has."""
    return next((name for name, found in own_addresses().items() if found == address), "")


def own_addresses() -> dict[str, str]:
    """Return the IPv4 address of each of this host's interfaces."""
    return {
        name: str(found.address)
        for name, addresses in psutil.net_if_addrs().items()
        for found in addresses
        if found.family == socket.AF_INET
    }
