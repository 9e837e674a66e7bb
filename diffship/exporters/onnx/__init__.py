"""ONNX: the layout and names of optimum's ONNX Runtime pipelines, from graphs that were made without any weight."""

from diffship.exporters.onnx.exporter import Onnx as Onnx
