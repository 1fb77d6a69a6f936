"""The latent cache: its files, and the jobs that fill, check and export it."""
