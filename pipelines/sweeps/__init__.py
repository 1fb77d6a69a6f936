"""Sweeps on Ray Tune: what they try, what is known of trials, what follows from it."""
