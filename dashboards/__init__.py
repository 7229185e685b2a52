"""The live dashboard: every sweep of a folder, beside MLflow in one process."""
