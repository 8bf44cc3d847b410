"""Scripts that build the files in ``sklembed/datasets/data``."""
