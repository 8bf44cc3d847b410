"""Scripts that make the files in ``data/``: for maintainers, not part of the wheel."""
