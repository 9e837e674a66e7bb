"""Core ML packages through torch.export and coremltools."""

from diffship.exporters.coreml.exporter import CoreMl as CoreMl
