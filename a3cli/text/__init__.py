"""Data sets and files → token blocks."""
