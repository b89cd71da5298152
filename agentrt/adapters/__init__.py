"""Adapters to outside libraries, each in a file of its own, imported only when used."""
