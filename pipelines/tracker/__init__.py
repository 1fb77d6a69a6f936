"""What stands between a run and its MLflow server, and what else watches a run."""
