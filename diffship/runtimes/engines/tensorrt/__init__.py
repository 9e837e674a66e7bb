"""TensorRT plans on NVIDIA GPUs: TensorRT-RTX or TensorRT, whichever built the plan."""

from diffship.runtimes.engines.tensorrt.runner import TensorRtRunner as TensorRtRunner
