"""What an exporter and a runner of one target must agree on: file formats, and what runs where."""
