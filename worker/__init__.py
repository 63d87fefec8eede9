"""What one machine does with one study: read, check, preprocess, infer, compose, write, deliver."""
