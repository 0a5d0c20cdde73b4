"""All metadata is in pyproject.toml. The native CPU kernels of csrc/ will be built here, with setuptools alone."""

from setuptools import setup

setup()
