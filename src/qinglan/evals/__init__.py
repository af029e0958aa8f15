"""Floor 3: metrics, judges, curves and the report page."""
