"""Attributions in the shapes that other tools take: one module for each tool, which imports it only where it is used."""
