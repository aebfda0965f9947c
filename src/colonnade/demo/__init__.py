"""The demonstration: a small network on bundled real data, down the whole road."""
