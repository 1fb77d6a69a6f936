"""The jobs that build, index, check and simulate a corpus."""
