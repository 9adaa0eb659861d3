"""Faults as they happen in practice, each sown into the ranks of a layout, and what verify must say about them."""
