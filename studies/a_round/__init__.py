"""What a round really is: local steps, optimizers, batches, precision, rounds."""
