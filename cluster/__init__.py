"""What the jobs run on: Ray and MLflow on this machine."""
