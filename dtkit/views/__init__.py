"""What a notebook shows: charts, tables and the live dashboard, drawn from a run's views."""
