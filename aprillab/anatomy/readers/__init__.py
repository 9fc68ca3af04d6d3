"""What each library calls the parts of its Vision Transformers: a file a library."""
