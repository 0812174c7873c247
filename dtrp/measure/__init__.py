"""What is measured of a run: traces, waiting times, prediction errors, memory."""
