"""The commands of ``rmx``; :mod:`rmx.cli` starts them."""
