"""Bundled recordings and the scripts that make them; the library reads the files by path."""
