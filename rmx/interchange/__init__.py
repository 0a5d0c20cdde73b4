"""The files of the method's released code."""
