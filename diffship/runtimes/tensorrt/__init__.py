"""TensorRT plans on NVIDIA GPUs: TensorRT-RTX or TensorRT, whichever built the plan."""

from diffship.runtimes.tensorrt.runner import TensorRtRunner as TensorRtRunner
