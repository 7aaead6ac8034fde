"""What `tokenmill run` does for methods that are no decoders: one module each, with a function `command`."""
