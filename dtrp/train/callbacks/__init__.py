"""Who is told what happens in a run: the console, TensorBoard, and callbacks of the user's."""
