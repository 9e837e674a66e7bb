"""What each ATen operator becomes in ONNX; importing this fills the table of `translate`."""

from diffship.exporters.onnx.operators import arithmetic as arithmetic
from diffship.exporters.onnx.operators import layers as layers
from diffship.exporters.onnx.operators import shapes as shapes
from diffship.exporters.onnx.translate import OPERATORS as OPERATORS
