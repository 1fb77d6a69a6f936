"""Images from a generator, and how good they are."""
