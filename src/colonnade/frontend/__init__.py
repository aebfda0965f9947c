"""ONNX → cleaned ONNX → Plan: fusion, layout assignment, memory."""

from colonnade.frontend.load import examine, imported, load

__all__ = ["examine", "imported", "load"]
