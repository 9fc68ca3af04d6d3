"""What each command takes: read, checked and explained without PyTorch, whose import takes seconds."""
