"""Where pipelines come from: folders, the hub, the packaged models, architectures; and what came with them."""
