"""ultralytics' models with its own trainer, loader and exporter; only `pytest -m ultralytics` runs these."""
