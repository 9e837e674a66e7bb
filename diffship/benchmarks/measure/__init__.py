"""The verb `bench`: cases, the processes that measure them in turns, and rows with their intervals; peers too."""
