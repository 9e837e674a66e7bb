"""Runs inside optimum's own environment: load a bundle as its users do, and draw from given latents."""

import json
import sys

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline
from safetensors.numpy import load_file, save_file

request = json.loads(sys.argv[2])
pipeline = ORTDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
latents = torch.from_numpy(load_file(request["latents"])["latents"])
images = pipeline(
    request["prompt"],
    num_inference_steps=request["steps"],
    guidance_scale=request["guidance"],
    height=request["size"],
    width=request["size"],
    latents=latents,
    output_type="np",
).images
save_file({"images": np.ascontiguousarray(images, dtype=np.float32)}, request["out"])
print(json.dumps({"class": type(pipeline).__name__, "shape": list(images.shape)}))
