"""Measuring: tokens per second beside the bytes that bound them. `bench(...)` in pipeline.py is the whole of it."""
