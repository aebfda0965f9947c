"""ONNX → cleaned ONNX → Plan: fusion, layout assignment, memory."""

from colonnade.frontend.feeding import LayoutCosts
from colonnade.frontend.load import examine, imported, load

__all__ = ["LayoutCosts", "examine", "imported", "load"]
