"""Images, their views, and their way to the encoder."""
