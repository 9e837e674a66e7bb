"""TensorRT: engines for NVIDIA GPUs, built from the ONNX graph of each part."""

from diffship.exporters.tensorrt.exporter import TensorRt as TensorRt
