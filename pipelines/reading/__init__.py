"""From an object store's bytes to pixels: requests, shards, decoders."""
