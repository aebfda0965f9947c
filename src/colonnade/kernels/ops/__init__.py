"""One file an operator family; each ends in ``ROWS`` for the registry."""
