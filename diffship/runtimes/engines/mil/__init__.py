"""Core ML's programs (MIL) computed with numpy, operation by operation, on any machine."""

from diffship.runtimes.engines.mil.runner import MilRunner as MilRunner
