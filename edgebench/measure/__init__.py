"""What is measured of a run: sensors, epochs, steps, latency; and what the model costs by arithmetic."""
