"""One file per family of samplers; each class has the name and the config keys of diffusers' scheduler."""
