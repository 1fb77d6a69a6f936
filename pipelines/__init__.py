"""Ray pipelines: ingest, training, evaluation and latent caching of image autoencoders."""
