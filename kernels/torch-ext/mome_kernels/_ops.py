"""The namespace of this package's ops. A Kernel Hub build replaces this file by one with a unique namespace."""

from __future__ import annotations


def add_op_namespace_prefix(name: str) -> str:
    """Returns `mome::name`."""
    return f"mome::{name}"
