"""What the defences of the position embedding stop."""
