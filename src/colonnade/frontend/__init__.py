"""ONNX → cleaned ONNX → Plan: fusion, layout assignment, memory."""

from colonnade.frontend.load import examine, load

__all__ = ["examine", "load"]
