"""The server and the handoff: load, faults, overhead."""
