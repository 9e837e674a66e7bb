"""Core ML: the files of a package, its names as Apple's Swift package opens them, and what clients need of a folder."""
