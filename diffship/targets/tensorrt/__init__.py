"""TensorRT and TensorRT-RTX: the two libraries, the GPUs that each serves, and the facts beside a plan."""
