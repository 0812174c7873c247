"""What a run is trained by, and what its model is judged by."""
