"""The namespace of this package's ops. A Kernel Hub build puts its own unique one here."""

from __future__ import annotations


def add_op_namespace_prefix(name: str) -> str:
    """`mome::name`."""
    return f"mome::{name}"
