"""ONNX → cleaned ONNX → Plan: fusion, layout assignment, memory."""

from colonnade.frontend.load import load

__all__ = ["load"]
