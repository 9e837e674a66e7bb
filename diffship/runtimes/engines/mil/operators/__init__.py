"""The operations of MIL in numpy, by their names in its operator reference (apple.github.io/coremltools, "MIL Ops")."""

from diffship.runtimes.engines.mil.operators import elementwise, layers, normal, shapes, stored  # noqa: F401  fill it
from diffship.runtimes.engines.mil.operators.table import OPERATORS as OPERATORS
from diffship.runtimes.engines.mil.operators.table import parameters as parameters
