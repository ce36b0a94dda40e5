"""Helpers that several test modules share; fixtures are in conftest.py."""
