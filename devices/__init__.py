"""Devices: what they are (`profiles/<device>.toml`) and how to reach them (`transports/<kind>.py`)."""
